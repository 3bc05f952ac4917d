"""Quantized matrix multiplication and the number formats that need it.

Operations: `int8_scaled_mm` (W8A8, dense), `fp8_scaled_mm` (E4M3 with static scales, dense and experts),
`grouped_mm` (mixture of experts, INT8), `fused_quantize` (norm or gate with the quantization that follows) and `exl3`
(trellis weights of 1 to 8 bits, searched and decoded). Each is a package with a naive `reference`, what the CPU runs,
and Triton kernels, behind one chooser that names every refusal.

Importing this package imports neither torch nor Triton nor vLLM: the names below are resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma4q_kernels import exl3, fp8_scaled_mm, fused_quantize, grouped_mm, int8_scaled_mm
    from gemma4q_kernels.support import Support

__all__ = ["Support", "exl3", "fp8_scaled_mm", "fused_quantize", "grouped_mm", "int8_scaled_mm"]

_SUBPACKAGES = frozenset({"exl3", "fp8_scaled_mm", "fused_quantize", "grouped_mm", "int8_scaled_mm"})


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    if name == "Support":
        return import_module(f"{__name__}.support").Support
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
