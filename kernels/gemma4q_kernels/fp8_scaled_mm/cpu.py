"""FP8 multiplication without FP8 instructions: codes decoded a block of rows at a time, float32 products and sums.

For CPUs, and for any GPU where Triton is missing. Decoded codes are exact, so the result differs from FP8 hardware's
only in the order of sums. The float32 scratch is 8 MB (or one row), whatever the weight's size.

On a CPU this takes about 15 times as long as BF16 weights do (one thread, AVX-512, N = K = 2048, M = 1 and 512): good
for looking at a checkpoint, not for traffic.
"""

import torch

from gemma4q_kernels.fp8_scaled_mm.problem import Problem
from gemma4q_kernels.fp8_scaled_mm.quantize import decode
from gemma4q_kernels.support import YES, Support

_SCRATCH_ELEMENTS = 1 << 21


def can_implement(problem: Problem) -> Support:
    """Always: torch decodes E4M3 on every device."""
    return YES


def accumulate(x: torch.Tensor, w_q: torch.Tensor) -> torch.Tensor:
    """Decoded activations times codes: float32 [M, K] and E4M3 [N, K] to float32 [N, M], the transposed product."""
    n, k = w_q.shape
    rows = min(max(1, _SCRATCH_ELEMENTS // max(k, 1)), max(n, 1))
    scratch = torch.empty((rows, k), dtype=torch.float32, device=w_q.device)
    out = torch.empty((n, x.shape[0]), dtype=torch.float32, device=w_q.device)
    columns = x.t()
    for start in range(0, n, rows):
        block = w_q[start : start + rows]
        torch.mm(decode(block, scratch[: len(block)]), columns, out=out[start : start + rows])
    return out


def scaled_mm(
    x_q: torch.Tensor,
    input_scale: torch.Tensor,
    w_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """See `gemma4q_kernels.fp8_scaled_mm.scaled_mm`."""
    out = accumulate(decode(x_q), w_q)
    out.mul_(input_scale.reshape(()) * weight_scale.reshape(-1, 1))
    if bias is not None:
        out.add_(bias.float().unsqueeze(1))
    return out.t().to(out_dtype).contiguous()
