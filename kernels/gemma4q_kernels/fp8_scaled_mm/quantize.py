"""E4M3 (`float8_e4m3fn`: no infinities, largest value 448): rounding activations, decoding codes.

Activations follow vLLM's kernels: x * (1 / scale) in float32, saturated at +-448, rounded to the nearest code, halves
to even. NaN stays NaN.
"""

from functools import cache

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def quantize_static(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round `x` to E4M3 with one given scale, so that x ~ codes * scale where |x| <= 448 * scale.

    Args:
        x: float, any shape.
        scale: float32, one element.
    """
    inverse = scale.float().reciprocal().reshape(())
    return (x.float() * inverse).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)


@cache
def _values(device: torch.device) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8, device=device).view(E4M3).float()


def decode(codes: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """E4M3 codes as float32, exactly; `out` (float32, contiguous, of the same shape) is written where it is given.

    A table of 256 values: on CPUs, torch 2.13 converts E4M3 element by element, which takes twice as long.
    """
    if codes.device.type != "cpu":
        return codes.float() if out is None else out.copy_(codes)
    index = codes.contiguous().view(torch.uint8).reshape(-1).int()
    flat = None if out is None else out.view(-1)
    return torch.index_select(_values(codes.device), 0, index, out=flat).view(codes.shape)
