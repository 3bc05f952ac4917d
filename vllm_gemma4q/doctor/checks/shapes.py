"""Tensors against the configuration: missing, of another shape, or of layers that the configuration does not have.

vLLM tells missing tensors only of models that are not quantized, and there by whole parameters: a shard of a fused
linear, one expert or a layer scalar may be missing without a word, and what was in memory is multiplied.
"""

import re
from collections.abc import Iterator

from vllm_gemma4q.architecture import (
    EXPERT_SHARDS,
    FUSED_SHARDS,
    Role,
    is_fused_experts,
)
from vllm_gemma4q.doctor.engines import Engine
from vllm_gemma4q.doctor.finding import Finding, Severity, about
from vllm_gemma4q.doctor.subject import CODES, PACKED, Subject
from vllm_gemma4q.module_headers import FLOATS, relative_name

_PARALLEL = frozenset({"o_proj", "down_proj", *(shard for shards in FUSED_SHARDS.values() for shard in shards)})
_PACKED = (".trellis", *PACKED)
_LAYER = re.compile(r"layers\.([0-9]+)\.")


def check(subject: Subject, engine: Engine) -> Iterator[Finding]:
    """Every tensor that the configuration asks for, and some that it does not."""
    if any(problem.code in ("missing-shard", "damaged-shard") for problem in subject.problems):
        return  # whatever is missing is in there
    fatal: list[str] = []
    silent: list[str] = []
    wrong: dict[bool, list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = {}
    for name, shape in _expected(subject):
        tensor = subject.names.get(name)
        if tensor is None:
            (silent if _is_silent(subject, engine, name) else fatal).append(_full(subject, name))
        elif tensor.shape != shape and tensor.dtype in (*CODES, *FLOATS):
            cut = _is_cut(subject, engine, name, tensor.shape, shape)
            wrong.setdefault(cut, []).append((tensor.name, tensor.shape, shape))
    for cut, mismatches in wrong.items():
        first, found, expected = mismatches[0]
        reason = "the engine takes a part of it without a word" if cut else "the engine stops"
        severity = Severity.WARNING if cut else Severity.ERROR
        yield Finding("shape-mismatch", severity, first, str(list(found)), f"{list(expected)}, as config.json says",
                      reason, subject.restore, len(mismatches))  # fmt: skip
    fix = subject.restore
    nothing = "nothing (missing)"
    yield from about("missing-tensor", Severity.ERROR, fatal, nothing, "it", "the engine stops", fix)
    reason = "the engine does not notice, and computes with ones or whatever was in memory"
    yield from about("missing-tensor", Severity.WARNING, silent, nothing, "it", reason, fix)
    yield from _surplus(subject)


def _expected(subject: Subject) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names by which each tensor is stored, or by which it is missed; packed ones are left to the plugin's facts."""
    for full, shape in subject.architecture.shapes():
        name = relative_name(full)
        if not is_fused_experts(full):
            module = name.removesuffix(".weight")
            if not any(module + suffix in subject.names for suffix in _PACKED):
                yield name, shape
        elif name in subject.names or f"{name}.weight" in subject.names:
            yield (name if name in subject.names else f"{name}.weight"), shape
        else:
            yield from _one_by_one(subject, name, shape)


def _one_by_one(subject: Subject, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    prefix, _, part = name.rpartition(".")
    down = part == "down_proj"
    height = shape[1] if down else shape[1] // 2
    for expert in range(shape[0]):
        for shard in EXPERT_SHARDS[2:] if down else EXPERT_SHARDS[:2]:
            module = f"{prefix}.{expert}.{shard}"
            if not any(module + suffix in subject.names for suffix in _PACKED):
                yield f"{module}.weight", (height, shape[2])


def _is_silent(subject: Subject, engine: Engine, name: str) -> bool:
    if engine.has_plugin and subject.is_claimed:
        return False
    if subject.quantization or name.endswith(".layer_scalar"):
        return True
    module, _, leaf = name.rpartition(".")
    prefix, _, last = module.rpartition(".")
    if ".experts." in name:  # one parameter for all of a layer's
        experts = name.partition(".experts.")[0] + ".experts."
        down = last == "down_proj"
        return any(key.startswith(experts) and ("down_proj" in key) == down for key in subject.names)
    siblings = [shards for shards in FUSED_SHARDS.values() if last in shards]
    return leaf == "weight" and bool(siblings) and any(f"{prefix}.{key}.weight" in subject.names for key in siblings[0])


def _is_cut(subject: Subject, engine: Engine, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether vLLM loads the first rows or columns of what is too large: where ranks would each take their part."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    axis = 1 if last in ("o_proj", "down_proj") else 0
    if (engine.has_plugin and subject.is_claimed) or len(found) != 2 or last not in _PARALLEL:
        return False
    return found[1 - axis] == expected[1 - axis] and found[axis] > expected[axis]


def _full(subject: Subject, name: str) -> str:
    return name if name.startswith("lm_head") else subject.architecture.root + name


def _surplus(subject: Subject) -> Iterator[Finding]:
    """Tensors for which engines have no place; other unknown names may be some engine's."""
    layers = subject.architecture.layers
    beyond, experts, values = [], [], []
    for name, tensor in subject.names.items():
        if not (match := _LAYER.match(name)) or ".layers." in name:
            continue
        index = int(match[1])
        role = subject.roles[tensor.name]
        if index >= len(layers):
            beyond.append(tensor.name)
        elif role in (Role.EXPERTS, Role.ROUTER) and layers[index].num_experts is None:
            experts.append(tensor.name)
        elif name.endswith("v_proj.weight") and layers[index].has_key_value and not layers[index].has_value:
            values.append(tensor.name)
    fix = subject.restore
    stops = "the engine stops: it has no place for it"
    yield from about("surplus-tensor", Severity.ERROR, beyond, "it", f"{len(layers)} layers, as config.json says",
                     stops, fix)  # fmt: skip
    yield from about("surplus-tensor", Severity.ERROR, experts, "it", "a dense model, as config.json says", stops, fix)
    yield from about("k-eq-v", Severity.ERROR, values, "values of their own",
                     "none: attention_k_eq_v says that they are the keys", stops, fix)  # fmt: skip
