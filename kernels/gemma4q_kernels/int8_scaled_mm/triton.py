"""INT8 W8A8 in Triton for NVIDIA and AMD GPUs: one GEMM with an int32 accumulator, one per-token quantization.

Layouts: x_q [M, K], w_q [N, K], both with unit stride along K; out [M, N] contiguous. Any M, N and K: edges are masked.
Importing this module imports Triton. It never decides by itself to run: `dispatch.choose` does.

Not done here: split-K for small M, persistent scheduling, epilogues that quantize.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
import torch
import triton
import triton.language as tl

from gemma4q_kernels.int8_scaled_mm.problem import Problem
from gemma4q_kernels.int8_scaled_mm.quantize import TOKEN_ABSMAX_MIN
from gemma4q_kernels.int8_scaled_mm.tiles import tile
from gemma4q_kernels.support import Support, architecture, no, triton_support

_ABSMAX_MIN = tl.constexpr(TOKEN_ABSMAX_MIN)
# Adding and taking away 1.5 * 2**23 rounds a float32 below 2**22 to the nearest integer, halves to even.
_ROUND = tl.constexpr(12582912.0)
_QUANTIZE_BLOCK = 2048


def can_implement(problem: Problem) -> Support:
    """A GPU (or the interpreter) with int8 matrix instructions."""
    support = triton_support(problem.device)
    if not support:
        return support
    arch = architecture(problem.device)
    if arch.startswith("sm_") and int(arch.removeprefix("sm_")) < 80:
        return no(f"needs sm_80 or newer, got {arch}")
    return support


@triton.jit
def scaled_mm_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_om,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_N] block of out = (x @ w.T) * x_scale * w_scale + bias."""
    program = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    # Walk GROUP_M rows of blocks column by column, so that blocks in flight share weights in the L2 cache.
    group = program // (GROUP_M * blocks_n)
    rows_in_group = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    block_m = group * GROUP_M + (program % (GROUP_M * blocks_n)) % rows_in_group
    block_n = (program % (GROUP_M * blocks_n)) // rows_in_group

    offsets_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_k = tl.arange(0, BLOCK_K)
    # Rows beyond the edge repeat earlier ones: loads need no mask along M and N, and the store drops them.
    x_ptrs = x_ptr + (offsets_m % M).to(tl.int64)[:, None] * stride_xm + offsets_k[None, :]
    w_ptrs = w_ptr + (offsets_n % N).to(tl.int64)[None, :] * stride_wn + offsets_k[:, None]

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offsets_k[None, :] < K - k, other=0)
            w = tl.load(w_ptrs, mask=offsets_k[:, None] < K - k, other=0)
        accumulator = tl.dot(x, w, accumulator, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    x_scale = tl.load(x_scale_ptr + offsets_m, mask=offsets_m < M, other=0.0)
    w_scale = tl.load(w_scale_ptr + offsets_n, mask=offsets_n < N, other=0.0)
    out = accumulator.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offsets_n, mask=offsets_n < N, other=0.0)
        out += bias.to(tl.float32)[None, :]
    out_ptrs = out_ptr + offsets_m.to(tl.int64)[:, None] * stride_om + offsets_n[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(offsets_m[:, None] < M) & (offsets_n[None, :] < N))


@triton.jit
def quantize_per_token_kernel(x_ptr, q_ptr, scale_ptr, K, stride_x, BLOCK_K: tl.constexpr):
    """One row: its largest magnitude, then its values; the second read comes from the cache."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK_K)
    # As integers, magnitudes order like the floats they encode, and NaN above all: tl.max of floats would lose it.
    largest = tl.zeros((BLOCK_K,), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row * stride_x + k + offsets, mask=offsets < K - k, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x).to(tl.int32, bitcast=True))
    absmax = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
    absmax = tl.where(absmax < _ABSMAX_MIN, _ABSMAX_MIN, absmax)
    scale = tl.div_rn(absmax, 127.0)
    inverse = tl.div_rn(1.0, scale)
    tl.store(scale_ptr + row, scale)
    for k in range(0, K, BLOCK_K):
        mask = offsets < K - k
        x = tl.load(x_ptr + row * stride_x + k + offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = (x * inverse + _ROUND) - _ROUND
        rounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0)
        tl.store(q_ptr + row * K + k + offsets, rounded.to(tl.int8), mask=mask)


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float [M, K] -> int8 [M, K] and float32 [M, 1]; the rule of `quantize.quantize_per_token`, to the bit."""
    m, k = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    q = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scale = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    if m:
        block = min(_QUANTIZE_BLOCK, triton.next_power_of_2(max(k, 1)))
        # Contracting x * inverse + 1.5 * 2**23 into one fused operation would round once, and ties differently.
        quantize_per_token_kernel[(m,)](x, q, scale, k, x.stride(0), BLOCK_K=block, num_warps=8, enable_fp_fusion=False)
    return q, scale


def scaled_mm(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """See `gemma4q_kernels.int8_scaled_mm.scaled_mm`."""
    x_q, w_q = (t if t.stride(-1) == 1 else t.contiguous() for t in (x_q, w_q))
    (m, k), n = x_q.shape, w_q.shape[0]
    shape = tile(architecture(w_q.device), m)
    out = torch.empty((m, n), dtype=out_dtype, device=w_q.device)
    grid = (triton.cdiv(m, shape.block_m) * triton.cdiv(n, shape.block_n),)
    scaled_mm_kernel[grid](
        x_q,
        x_scale.contiguous(),
        w_q,
        w_scale.contiguous(),
        out if bias is None else bias.contiguous(),  # never read without a bias, but Triton needs a pointer
        out,
        m,
        n,
        k,
        x_q.stride(0),
        w_q.stride(0),
        out.stride(0),
        HAS_BIAS=bias is not None,
        EVEN_K=k % shape.block_k == 0,
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        BLOCK_K=shape.block_k,
        GROUP_M=shape.group_m,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        enable_fp_fusion=False,
    )
    return out
