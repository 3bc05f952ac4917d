"""FP8 in Triton: one GEMM, with FP8 matrix instructions where the GPU has them and float16 ones where not.

Layouts: x_q [M, K], w_q [N, K], both with unit stride along K; out [M, N] contiguous. Any M, N and K: edges are masked.
Without FP8 instructions (sm_80, gfx1100) codes are read as bytes and widened to float16, which is exact: the seven
magnitude bits of E4M3 shifted to the top of float16's, times 2**8. Importing this module imports Triton.

Where FP8 instructions are used, sums are promoted to float32 as often as the hardware's default has it: Hopper keeps
about 14 bits between promotions.

Not done here: split-K for small M, persistent scheduling, fused quantization. Tiles are untimed.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gemma4q_kernels.fp8_scaled_mm.problem import Problem
from gemma4q_kernels.support import Support, architecture, no, triton_support


@dataclass(frozen=True)
class Tile:
    """Launch parameters: block of the output, step over K, warps, pipeline stages, rows of blocks that share L2."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8


_SMALL = Tile(16, 64, 128, 4, 2)
_WIDENED = Tile(64, 64, 64, 4, 2)
_NATIVE = Tile(128, 128, 128, 8, 3)


def has_fp8_instructions(arch: str) -> bool:
    """Whether Triton multiplies E4M3 natively on an architecture as `support.architecture` names it."""
    if arch.startswith("sm_"):
        return int(arch.removeprefix("sm_")) >= 89
    return arch in ("gfx950", "gfx1200", "gfx1201")


def tile(arch: str, m: int) -> Tile:
    """The tile for M rows of activations; each compiles without spilling, which tests/numerics asserts."""
    if m <= 16:
        return _SMALL
    return _NATIVE if has_fp8_instructions(arch) else _WIDENED


def can_implement(problem: Problem) -> Support:
    """A GPU (or the interpreter) with float16 matrix instructions."""
    support = triton_support(problem.device)
    if not support:
        return support
    arch = architecture(problem.device)
    if arch.startswith("sm_") and int(arch.removeprefix("sm_")) < 80:
        return no(f"needs sm_80 or newer, got {arch}")
    return support


@triton.jit
def _widen(codes):
    """E4M3 codes (int8) as float16, exactly; NaN stays NaN."""
    bits = codes.to(tl.int16)
    magnitude = (bits & 0x7F) << 7
    # int8 codes extend their sign over the upper half of int16, so its topmost bit is the sign already.
    values = (magnitude | (bits & -32768)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), values).to(tl.float16)


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
    NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_N] block of out = (x @ w.T) * x_scale * w_scale + bias; codes are int8 unless NATIVE."""
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

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offsets_k[None, :] < K - k, other=0.0)
            w = tl.load(w_ptrs, mask=offsets_k[:, None] < K - k, other=0.0)
        accumulator = tl.dot(x, w, accumulator) if NATIVE else tl.dot(_widen(x), _widen(w), accumulator)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    x_scale = tl.load(x_scale_ptr)
    w_scale = tl.load(w_scale_ptr + offsets_n, mask=offsets_n < N, other=0.0)
    out = accumulator * (x_scale * w_scale)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offsets_n, mask=offsets_n < N, other=0.0)
        out += bias.to(tl.float32)[None, :]
    out_ptrs = out_ptr + offsets_m.to(tl.int64)[:, None] * stride_om + offsets_n[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(offsets_m[:, None] < M) & (offsets_n[None, :] < N))


def scaled_mm(
    x_q: torch.Tensor,
    input_scale: torch.Tensor,
    w_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """See `gemma4q_kernels.fp8_scaled_mm.scaled_mm`."""
    arch = architecture(w_q.device)
    native = has_fp8_instructions(arch)
    x_q, w_q = (t if t.stride(-1) == 1 else t.contiguous() for t in (x_q, w_q))
    (m, k), n = x_q.shape, w_q.shape[0]
    shape = tile(arch, m)
    out = torch.empty((m, n), dtype=out_dtype, device=w_q.device)
    grid = (triton.cdiv(m, shape.block_m) * triton.cdiv(n, shape.block_n),)
    scaled_mm_kernel[grid](
        x_q if native else x_q.view(torch.int8),
        input_scale,
        w_q if native else w_q.view(torch.int8),
        weight_scale.contiguous(),
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
        NATIVE=native,
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        BLOCK_K=shape.block_k,
        GROUP_M=shape.group_m,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        enable_fp_fusion=False,
    )
    return out
