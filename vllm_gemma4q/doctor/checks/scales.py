"""Quantized weights and their scales: what should not be quantized, scales that are missing or left over, shards that
engines fuse and that disagree.
"""

import re
from collections.abc import Iterator

from vllm_gemma4q.architecture import FUSED_SHARDS, LINEAR_ROLES, Role
from vllm_gemma4q.doctor.engines import EXLLAMAV3, Engine
from vllm_gemma4q.doctor.finding import Finding, Severity, about
from vllm_gemma4q.doctor.stock import is_tower_linear
from vllm_gemma4q.doctor.subject import CODES, PACKED, Scheme, Subject
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.fp8_static.facts import Facts as Fp8Facts
from vllm_gemma4q.module_headers import FLOATS, fused_expert_part
from vllm_gemma4q.restore.formats import parse_format
from vllm_gemma4q.restore.names import canonical, is_weight

_SCALE = re.compile(
    r"(?:[._](?:weight_scale|weight_scale_inv|input_scale|act_scale)|\.(?:gate_up_proj|down_proj)_scale)$"
)
_LEAVES = (".weight", ".trellis", *PACKED)


def check(subject: Subject, engine: Engine) -> Iterator[Finding]:
    """All of the above."""
    yield from _never_quantized(subject, engine)
    if subject.scheme is Scheme.UNQUANTIZED:
        yield from _without_config(subject)
        return
    yield from _missing(subject, engine)
    yield from _left_over(subject, engine)
    yield from _fused(subject, engine)


def _never_quantized(subject: Subject, engine: Engine) -> Iterator[Finding]:
    by_role: dict[Role, list[str]] = {}
    for name, tensor in subject.tensors.items():
        role = subject.roles[name]
        is_rounded = (tensor.dtype in CODES and name.endswith(".weight")) or name.endswith(_LEAVES[1:])
        if is_rounded and not _has_scales(subject, name, engine) and not _is_mended(subject, role, name, engine):
            by_role.setdefault(role, []).append(name)
    for role, names in by_role.items():
        dtype = subject.tensors[names[0]].dtype
        reason = f"{role} has no place for scales, and codes are not weights"
        yield from about(
            "never-quantized", Severity.ERROR, names, dtype, "BF16, as in the original", reason, subject.restore
        )


def _has_scales(subject: Subject, name: str, engine: Engine) -> bool:
    """Whether the engine has a place for a weight's scales: in layers, and where vLLM quantizes towers or the head."""
    if subject.roles[name] in LINEAR_ROLES:
        return True
    if not engine.is_vllm or (engine.has_plugin and subject.is_claimed):
        return False
    is_gptq_head = name == "lm_head.qweight" and bool(subject.quantization.get("lm_head"))
    return is_gptq_head or is_tower_linear(name, subject.config)


def _is_mended(subject: Subject, role: Role, name: str, engine: Engine) -> bool:
    """What the plugin makes good, norms that Quark rounded, and what is EXL3's own: its output layer, in any engine."""
    if name.endswith(".trellis"):
        return subject.scheme is Scheme.EXL3 and (role is Role.LM_HEAD or engine.name == EXLLAMAV3)
    return engine.has_plugin and role is Role.NORM and subject.scheme is Scheme.INT8


def _without_config(subject: Subject) -> Iterator[Finding]:
    names = [
        name for name, tensor in subject.tensors.items() if subject.roles[name] in LINEAR_ROLES
        and (tensor.dtype in CODES or name.endswith(_LEAVES[1:]))
    ]  # fmt: skip
    found = f"{subject.tensors[names[0]].dtype} without a quantization_config" if names else ""
    reason = "the engine takes codes for weights, and stops at their scales"
    expected = "config.json to say how it is quantized"
    yield from about("no-quantization-config", Severity.ERROR, names, found, expected, reason, subject.requantize)


def _missing(subject: Subject, engine: Engine) -> Iterator[Finding]:
    try:
        form = parse_format(subject.config)
    except InputError:
        return  # of a method without such scales
    names = {canonical(name): tensor for name, tensor in subject.tensors.items()}
    missing: dict[str, list[str]] = {}
    for name, tensor in names.items():
        is_rounded = tensor.dtype in CODES or name.endswith(PACKED)
        if is_rounded and is_weight(name) and _has_scales(subject, tensor.name, engine):
            scale = form.missing(name, names)
            if scale is not None:
                missing.setdefault(scale, []).append(tensor.name)
    refuses = engine.has_plugin and subject.is_claimed
    severity = Severity.ERROR if refuses else Severity.WARNING
    reason = "the plugin refuses it" if refuses else "the engine does not notice: its scale is whatever was in memory"
    for scale, weights in missing.items():
        yield from about(
            "missing-scale", severity, weights, f"codes without their {scale}", "both", reason, subject.requantize
        )


def _left_over(subject: Subject, engine: Engine) -> Iterator[Finding]:
    names = sorted(name for name in subject.tensors if _SCALE.search(name) and not _has_codes(subject, name))
    if engine.has_plugin and isinstance(subject.facts, Fp8Facts):
        dropped = [name for name in names if name in subject.facts.leftovers]
        reason = "the plugin drops it: its module is on the list of those that are not quantized"
        found, expected = "a scale of an unquantized weight", "none"
        yield from about("leftover-scale", Severity.NOTE, dropped, found, expected, reason, subject.restore)
        names = [name for name in names if name not in subject.facts.leftovers]
    reason = "the engine stops: an unquantized module has no place for it"
    yield from about(
        "leftover-scale", Severity.ERROR, names, "a scale of an unquantized weight", "none", reason, subject.restore
    )


def _has_codes(subject: Subject, scale: str) -> bool:
    """Whether the weight of a scale is quantized."""
    match = _SCALE.search(scale)
    assert match is not None
    module = scale[: match.start()]
    if fused_expert_part(scale) and not module.endswith(("gate_up_proj", "down_proj")):
        module = scale.removesuffix("_scale")
    candidates = [module + leaf for leaf in (*_LEAVES, "")]
    return any(name in subject.tensors and subject.tensors[name].dtype not in FLOATS for name in candidates)


def _fused(subject: Subject, engine: Engine) -> Iterator[Finding]:
    """Shards that engines fuse into one linear, some quantized and some not."""
    mixed = []
    for layer in subject.architecture.layers:
        for parent, fused in (("self_attn", "qkv_proj"), ("mlp", "gate_up_proj")):
            prefix = f"layers.{layer.index}.{parent}."
            if parent == "self_attn" and not layer.has_key_value:
                continue
            kinds = {_is_quantized(subject, prefix + shard): shard for shard in FUSED_SHARDS[fused]}
            kinds.pop(None, None)
            if len(kinds) == 2:
                mixed.append(f"{subject.architecture.root}{prefix}{kinds[False]}.weight")
    refuses = engine.has_plugin and subject.is_claimed
    severity = Severity.ERROR if refuses else Severity.WARNING
    reason = "one linear has one scheme: " + ("the plugin refuses it" if refuses else "one of them is read as garbage")
    expected = "what its fused siblings have"
    yield from about("fused-disagree", severity, mixed, "unquantized weights", expected, reason, subject.requantize)


def _is_quantized(subject: Subject, module: str) -> bool | None:
    """None where there is no such module."""
    if any(module + leaf in subject.names for leaf in _LEAVES[1:]):
        return True
    tensor = subject.names.get(f"{module}.weight")
    return None if tensor is None else tensor.dtype not in FLOATS
