"""The oracle: INT8 products summed in float64, which is exact for every K that int32 can hold. Slow, any device."""

import torch

from gemma4q_kernels.int8_scaled_mm.problem import Problem, scale_accumulator
from gemma4q_kernels.support import YES, Support


def can_implement(problem: Problem) -> Support:
    """Always: only `Problem` itself limits it."""
    return YES


def integer_mm(x_q: torch.Tensor, w_q: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] times int8 [N, K] transposed, as exact int32 [M, N]."""
    return (x_q.double() @ w_q.double().t()).to(torch.int32)


def scaled_mm(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """See `gemma4q_kernels.int8_scaled_mm.scaled_mm`."""
    return scale_accumulator(integer_mm(x_q, w_q), x_scale, w_scale, bias, out_dtype)
