"""vLLM 0.32's `triton_scaled_mm` for int8, written again from its algorithm, for machines without vLLM.

What makes its speed is kept: programs in row-major order of blocks, 64-bit offsets, masks along M, N and K at every
step, an int32 accumulator, scales at the end, its four tiles by M and N, and Triton's default warps and stages.

out[m, n] = sum_k x[m, k] * w[n, k] * x_scale[m] * w_scale[n]; no bias here.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
import torch
import triton
import triton.language as tl


@triton.jit
def scaled_mm_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of out, [M, N] contiguous; x [M, K] and w [N, K] have unit stride along K."""
    columns = tl.cdiv(N, BLOCK_N)
    rows_m = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    rows_n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    step = tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptrs = x_ptr + stride_xm * rows_m[:, None] + step[None, :]
    w_ptrs = w_ptr + step[:, None] + stride_wn * rows_n[None, :]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for _ in range(tl.cdiv(K, BLOCK_K)):
        x = tl.load(x_ptrs, mask=(rows_m < M)[:, None] & (step < K)[None, :], other=0)
        w = tl.load(w_ptrs, mask=(step < K)[:, None] & (rows_n < N)[None, :], other=0)
        accumulator = tl.dot(x, w, accumulator, out_dtype=tl.int32)
        step += BLOCK_K
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    x_scale = tl.load(x_scale_ptr + rows_m, mask=rows_m < M, other=0.0)
    w_scale = tl.load(w_scale_ptr + rows_n, mask=rows_n < N, other=0.0)
    out = x_scale[:, None] * accumulator.to(tl.float32)
    out = w_scale[None, :] * out
    inside = (rows_m < M)[:, None] & (rows_n < N)[None, :]
    tl.store(out_ptr + rows_m[:, None] * N + rows_n[None, :], out.to(out_ptr.type.element_ty), mask=inside)


def block_sizes(m: int, n: int) -> tuple[int, int, int]:
    """Its heuristic: BLOCK_M, BLOCK_N, BLOCK_K."""
    if m <= 32:
        return (64, 64, 256) if n < 8192 else (64, 128, 256)
    if m <= 64:
        return 64, 64, 256
    return (64, 128, 128) if m <= 128 else (128, 128, 128)


def scaled_mm(x_q: torch.Tensor, x_scale: torch.Tensor, w_q: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """int8 [M, K], float32 [M, 1], int8 [N, K], float32 [N] -> bfloat16 [M, N]."""
    (m, k), n = x_q.shape, len(w_q)
    out = torch.empty((m, n), dtype=torch.bfloat16, device=x_q.device)
    block_m, block_n, block_k = block_sizes(m, n)
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)
    strides = x_q.stride(0), w_q.stride(0)
    scaled_mm_kernel[grid](
        x_q, x_scale, w_q, w_scale, out, m, n, k, *strides, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k
    )
    return out
