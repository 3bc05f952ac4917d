"""How much of each kind of weight is quantized, and what a quantizer forgot."""

import math
from collections.abc import Iterator

from vllm_gemma4q.architecture import Role, is_linear_weight
from vllm_gemma4q.doctor.engines import Engine
from vllm_gemma4q.doctor.finding import Finding, Severity
from vllm_gemma4q.doctor.subject import Scheme, Subject
from vllm_gemma4q.module_headers import FLOATS

_LAYERS = (Role.ATTENTION, Role.MLP)


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
    for name, tensor in subject.tensors.items():
        role = subject.roles[name]
        is_trellis = name.endswith(".trellis") and len(tensor.shape) == 3
        if role is Role.NORM or not (is_trellis or _is_weight(name, tensor.shape)):
            continue
        # A trellis is [in/16, out/16, words]; eight packed 4-bit weights are an I32.
        parameters = 256 * tensor.shape[0] * tensor.shape[1] if is_trellis else math.prod(tensor.shape)
        parameters *= 8 if name.endswith("_packed") else 1
        quantized, total = counts.get(role.value, (0, 0))
        rounded = 0 if tensor.dtype in FLOATS else parameters
        counts[role.value] = quantized + rounded, total + parameters
    return counts


def _is_weight(name: str, shape: tuple[int, ...]) -> bool:
    plain = name.removesuffix("_packed")
    return is_linear_weight(plain, shape) or (plain.endswith(".weight") and len(shape) == 2)
