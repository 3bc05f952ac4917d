"""What an EXL3 conversion does to each role, in numbers: linears by bits, bytes, bits a weight, and errors."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_gemma4q.architecture import Role, role_of
from vllm_gemma4q.checkpoint.steps import Step
from vllm_gemma4q.linears import Linear

LAYERS = "layers"
_ERRORS = ("nmse", "proxy")


def by_role(linears: Sequence[Linear], bits: Mapping[str, int], steps: Iterable[Step]) -> dict[str, dict[str, Any]]:
    """By role, and for all roles but the output layer as `layers`.

    Returns:
        linears: how many have so many bits; weights, of the model; bytes, of all that is stored for them;
        bpw: bits stored a weight, scales and padding included.
    """
    stored = _stored(steps)
    rows: dict[str, dict[str, Any]] = {}
    for name, members in _members(linears).items():
        weights = sum(linear.shape[0] * linear.shape[1] for linear in members)
        n_bytes = sum(stored[linear.module] for linear in members)
        counts = Counter(bits[linear.module] for linear in members)
        rows[name] = {
            "linears": {str(count): counts[count] for count in sorted(counts)},
            "weights": weights,
            "bytes": n_bytes,
            "bpw": round(8 * n_bytes / weights, 4),
        }
    return rows


def with_errors(
    linears: Sequence[Linear],
    details: Mapping[str, Mapping[str, Mapping[str, Any]]],
    notes: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Details of a plan and what was measured on the way.

    Args:
        details: `linears` by module, and `bits` by role as `by_role` has them.
        notes: `nmse` and `proxy` by module.

    Returns:
        Both with the errors; a role's is the mean over its weights.
    """
    roles = {}
    for name, members in _members(linears).items():
        weights = {linear.module: linear.shape[0] * linear.shape[1] for linear in members}
        means = {
            error: sum(notes[module][error] * count for module, count in weights.items()) / sum(weights.values())
            for error in _ERRORS
        }
        roles[name] = {**details["bits"][name], **means}
    return {"bits": roles, "linears": {name: {**row, **notes[name]} for name, row in details["linears"].items()}}


def _members(linears: Iterable[Linear]) -> dict[str, list[Linear]]:
    """Linears of each role, in the order of roles, then those of all layers."""
    found: dict[Role, list[Linear]] = {}
    for linear in linears:
        found.setdefault(role_of(f"{linear.module}.weight"), []).append(linear)
    members = {role.value: found[role] for role in Role if role in found}
    layers = [linear for role, group in found.items() if role is not Role.LM_HEAD for linear in group]
    return {**members, LAYERS: layers}


def _stored(steps: Iterable[Step]) -> dict[str, int]:
    """Bytes by module of all that is computed."""
    return {step.outputs[0].name.rpartition(".")[0]: step.output_bytes for step in steps if step.compute is not None}
