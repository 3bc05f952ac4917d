"""Rounding to E4M3 as engines do: divide by the scale, saturate at +-448, round half to even.

torch's own cast does not saturate: above 464 it gives NaN. Not done here: E4M3FNUZ (AMD's older form), E5M2.
"""

import torch
from gemma4q_kernels.fp8_scaled_mm.quantize import E4M3, decode

from vllm_gemma4q.fp8_static.format import MAX


def quantize(values: torch.Tensor, scale: torch.Tensor | float, out: torch.Tensor | None = None) -> torch.Tensor:
    """Codes of `values / scale`.

    Args:
        values: float, any shape, finite.
        scale: float32, positive; broadcasts against `values`.
        out: float8_e4m3fn in the shape of `values`, written instead of a new tensor.
    """
    scaled = (values.float() / scale).clamp_(-MAX, MAX)
    return scaled.to(E4M3) if out is None else out.copy_(scaled)


def round_trip(values: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """float32: what `values` become when they are quantized and multiplied by the scale again."""
    return decode(quantize(values, scale)) * scale
