"""The fused steps, unfused: plain torch in float32, one operation after the other. Any device."""

import torch

from gemma4q_kernels.fused_quantize.problem import ROUNDINGS, Normed, Problem
from gemma4q_kernels.grouped_mm.activation import activate
from gemma4q_kernels.int8_scaled_mm.quantize import quantize_per_token
from gemma4q_kernels.support import YES, Support


def can_implement(problem: Problem) -> Support:
    """Always."""
    return YES


def _product(first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype, rounding: str) -> torch.Tensor:
    """first * second in float32, after as many roundings to `dtype` as `rounding` says."""
    times = ROUNDINGS.index(rounding)
    if times >= 2:
        first = first.to(dtype).float()
    product = first * second.float()
    return product.to(dtype).float() if times >= 1 else product


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, rounding: str) -> torch.Tensor:
    """x / sqrt(mean(x**2) + eps) * weight, [T, H] -> float32 [T, H]."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + eps)
    return _product(normed, weight, dtype, rounding)


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    input_weight: torch.Tensor | None,
    eps: float,
    rounding: str,
) -> Normed:
    """See `gemma4q_kernels.fused_quantize.rms_norm_quantize`."""
    total = x.float() if input_weight is None else rms_norm(x, input_weight, eps, x.dtype, rounding)
    if residual is not None:
        total = residual = (total + residual.float()).to(x.dtype)
    q, scale = quantize_per_token(rms_norm(total, weight, eps, x.dtype, rounding))
    return Normed(q, scale, residual)


def gated_quantize(gate_up: torch.Tensor, activation: str, rounding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """See `gemma4q_kernels.fused_quantize.gated_quantize`."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return quantize_per_token(_product(activate(gate, activation), up, gate_up.dtype, rounding))
