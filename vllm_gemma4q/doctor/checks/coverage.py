"""How much of each kind of weight is quantized, and what a quantizer forgot.

Not done: packed weights of several widths, which all count as the narrowest.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_gemma4q.architecture import Role, is_linear_weight
from vllm_gemma4q.checkpoint.header import DTYPE_BYTES
from vllm_gemma4q.doctor.engines import Engine
from vllm_gemma4q.doctor.finding import Finding, Severity
from vllm_gemma4q.doctor.subject import PACKED, Scheme, Subject
from vllm_gemma4q.module_headers import FLOATS

_LAYERS = (Role.ATTENTION, Role.MLP)
_USUAL_BITS = 4
_FP4_PAIR, _FP4_BITS = "U8", 4  # a byte of two, whatever the weight's name


def check(subject: Subject, engine: Engine) -> Iterator[Finding]:
    """Experts that a tool did not see, and a configuration that promises what the file does not hold."""
    counts = coverage(subject)
    if subject.scheme is Scheme.UNQUANTIZED:
        return
    if not any(quantized for quantized, _ in counts.values()):
        reason = "it takes as much memory as the original"
        yield Finding("nothing-quantized", Severity.WARNING, "quantization_config", "no quantized weight",
                      f"{subject.quantization.get('quant_method')} weights", reason, subject.requantize)  # fmt: skip
        return
    quantized, total = counts.get(Role.EXPERTS.value, (0, 0))
    if quantized < total:
        reason = "most of a mixture's weights are its experts': quantizers that know linears only pass them by"
        found = f"{quantized / total:.0%} of their weights quantized"
        yield Finding("experts-unquantized", Severity.WARNING, "experts", found, "100%", reason, subject.requantize)
    for role in _LAYERS:
        quantized, total = counts.get(role.value, (0, 0))
        if quantized < total:
            found = f"{quantized / total:.1%} of its weights quantized"
            yield Finding("partly-quantized", Severity.NOTE, role.value, found, "100%", "a choice of the quantizer's")


def coverage(subject: Subject) -> dict[str, tuple[int, int]]:
    """Parameters of each kind of linear: those that are quantized, and all."""
    counts: dict[str, tuple[int, int]] = {}
    bits = _bits(subject.quantization)
    for name, tensor in subject.tensors.items():
        role = subject.roles[name]
        is_trellis = name.endswith(".trellis") and len(tensor.shape) == 3
        if role is Role.NORM or not (is_trellis or _is_weight(name, tensor.shape)):
            continue
        # A trellis is [in/16, out/16, words].
        parameters = 256 * tensor.shape[0] * tensor.shape[1] if is_trellis else math.prod(tensor.shape)
        if _is_packed(name, tensor.dtype):
            width = _FP4_BITS if tensor.dtype == _FP4_PAIR else bits
            parameters = parameters * 8 * DTYPE_BYTES[tensor.dtype] // width
        quantized, total = counts.get(role.value, (0, 0))
        rounded = 0 if tensor.dtype in FLOATS else parameters
        counts[role.value] = quantized + rounded, total + parameters
    return counts


def _is_packed(name: str, dtype: str) -> bool:
    """Whether an element holds several weights."""
    return dtype == _FP4_PAIR or (name.endswith(("_packed", *PACKED)) and dtype not in FLOATS)


def _bits(quantization: Mapping[str, Any]) -> int:
    """Of a packed weight: GPTQ's and AWQ's are one number, compressed-tensors' one for each group."""
    found = [quantization.get("bits"), quantization.get("w_bit")]
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        found.append(weights.get("num_bits") if isinstance(weights, Mapping) else None)
    return min((bits for bits in found if type(bits) is int and 1 <= bits <= 8), default=_USUAL_BITS)


def _is_weight(name: str, shape: tuple[int, ...]) -> bool:
    plain = name.removesuffix("_packed").replace(".qweight", ".weight")
    return is_linear_weight(plain, shape) or (plain.endswith(".weight") and len(shape) == 2)
