"""INT8 W8A8 in Triton for NVIDIA and AMD GPUs: one GEMM with an int32 accumulator, one per-token quantization.

Layouts: x_q [M, K], w_q [N, K], both with unit stride along K; out [M, N] contiguous. Any M, N and K: edges are masked.
Importing this module imports Triton. It never decides by itself to run: `dispatch.choose` does. How it is launched is
data (tiles.py): nothing is tuned, timed or synchronized in a call, so that CUDA graphs capture it.

Where one block of the output a program would leave compute units idle (decoding), K is divided as well: int32 partial
sums [parts, M, N], then a second kernel that adds and scales them. Integer sums are exact in any order, so the result
is the same to the bit. Atomic additions would need a cleared output and still a second kernel to scale; adding up in
the last program to finish would save that launch, but rests on memory ordering that only a GPU can test.

Not done here: persistent scheduling, epilogues that quantize.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
import torch
import triton
import triton.language as tl

from gemma4q_kernels.int8_scaled_mm.problem import Problem
from gemma4q_kernels.int8_scaled_mm.quantize import TOKEN_ABSMAX_MIN
from gemma4q_kernels.int8_scaled_mm.tiles import Tile, plan
from gemma4q_kernels.support import Support, architecture, no, triton_support

_ABSMAX_MIN = tl.constexpr(TOKEN_ABSMAX_MIN)
# Adding and taking away 1.5 * 2**23 rounds a float32 below 2**22 to the nearest integer, halves to even.
_ROUND = tl.constexpr(12582912.0)
_QUANTIZE_BLOCK = 2048
_REDUCE_BLOCK = 256
_REDUCE_WARPS = 2


def can_implement(problem: Problem) -> Support:
    """A GPU (or the interpreter) with int8 matrix instructions."""
    support = triton_support(problem.device)
    if not support:
        return support
    arch = architecture(problem.device)
    if arch.startswith("sm_") and int(arch.removeprefix("sm_")) < 80:
        return no(f"needs sm_80 or newer, got {arch}")
    return support


@triton.jit(do_not_specialize=("M",))
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
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_N] block of out = (x @ w.T) * x_scale * w_scale + bias.

    Grid [blocks, SPLIT_K]. With SPLIT_K > 1, `out_ptr` is int32 [SPLIT_K, M, N] and gets the sums over one part of K.
    """
    program = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    # Walk GROUP_M rows of blocks column by column, so that blocks in flight share weights in the L2 cache.
    group = program // (GROUP_M * blocks_n)
    rows_in_group = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    start_m = (group * GROUP_M + (program % (GROUP_M * blocks_n)) % rows_in_group) * BLOCK_M
    start_n = ((program % (GROUP_M * blocks_n)) // rows_in_group) * BLOCK_N
    start_k = 0
    end_k = K
    if SPLIT_K > 1:
        part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
        start_k = tl.minimum(tl.program_id(1) * part, K)  # nothing is left for the last parts at times: zeros
        end_k = tl.minimum(start_k + part, K)

    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    offsets_k = tl.arange(0, BLOCK_K)
    # A scalar 64-bit base and 32-bit offsets within the block take half the address registers of 64-bit pointers.
    # Rows beyond the edge repeat the last one: loads need no mask along M and N, and the store drops them.
    x_base = x_ptr + start_m.to(tl.int64) * stride_xm + start_k
    w_base = w_ptr + start_n.to(tl.int64) * stride_wn + start_k
    x_offsets = tl.minimum(local_m, M - 1 - start_m)[:, None] * stride_xm + offsets_k[None, :]
    w_offsets = tl.minimum(local_n, N - 1 - start_n)[None, :] * stride_wn + offsets_k[:, None]

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for _ in range(start_k, end_k - BLOCK_K + 1, BLOCK_K):
        accumulator = tl.dot(tl.load(x_base + x_offsets), tl.load(w_base + w_offsets), accumulator, out_dtype=tl.int32)
        x_base += BLOCK_K
        w_base += BLOCK_K
    if not EVEN_K:
        # The remainder on its own: masks inside the loop cost half again as many registers, and spills on gfx1100.
        # Not by %, of which Triton before 3.9 does not see that it is a multiple of 16: it would load byte by byte.
        inside_k = offsets_k < end_k - start_k - (end_k - start_k) // BLOCK_K * BLOCK_K
        x = tl.load(x_base + x_offsets, mask=inside_k[None, :], other=0)
        w = tl.load(w_base + w_offsets, mask=inside_k[:, None], other=0)
        accumulator = tl.dot(x, w, accumulator, out_dtype=tl.int32)

    offsets_m = start_m + local_m
    offsets_n = start_n + local_n
    inside = (offsets_m[:, None] < M) & (offsets_n[None, :] < N)
    out_ptrs = out_ptr + offsets_m.to(tl.int64)[:, None] * N + offsets_n[None, :]
    if SPLIT_K > 1:
        tl.store(out_ptrs + tl.program_id(1).to(tl.int64) * M * N, accumulator, mask=inside)
    else:
        x_scale = tl.load(x_scale_ptr + offsets_m, mask=offsets_m < M, other=0.0)
        w_scale = tl.load(w_scale_ptr + offsets_n, mask=offsets_n < N, other=0.0)
        out = accumulator.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offsets_n, mask=offsets_n < N, other=0.0)
            out += bias.to(tl.float32)[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("M",))
def reduce_kernel(
    sums_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N columns of one row of out = sum(int32 [SPLIT_K, M, N]) * x_scale * w_scale + bias. Grid [blocks, M]."""
    row = tl.program_id(1).to(tl.int64)
    offsets = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offsets < N
    total = tl.zeros((BLOCK_N,), dtype=tl.int32)
    for split in tl.static_range(SPLIT_K):
        total += tl.load(sums_ptr + (split * M + row) * N + offsets, mask=mask, other=0)
    out = total.to(tl.float32) * tl.load(x_scale_ptr + row) * tl.load(w_scale_ptr + offsets, mask=mask, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


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
    (m, k), n = x_q.shape, w_q.shape[0]
    tile, splits = plan(architecture(w_q.device), m, n, k)
    return launch(x_q, x_scale, w_q, w_scale, bias, out_dtype, tile, splits)


def launch(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile,
    splits: int,
) -> torch.Tensor:
    """As `scaled_mm`, with launch parameters that the caller chose: any number of splits from 1 on is right."""
    x_q, w_q = (t if t.stride(-1) == 1 else t.contiguous() for t in (x_q, w_q))
    x_scale, w_scale = x_scale.contiguous(), w_scale.contiguous()
    (m, k), n = x_q.shape, w_q.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=w_q.device)
    # Without a bias its pointer is never read, but Triton needs one.
    bias_or_any = out if bias is None else bias.contiguous()
    target = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.int32, device=w_q.device)
    scaled_mm_kernel[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n), splits)](
        x_q,
        x_scale,
        w_q,
        w_scale,
        bias_or_any,
        target,
        m,
        n,
        k,
        x_q.stride(0),
        w_q.stride(0),
        HAS_BIAS=bias is not None and splits == 1,
        EVEN_K=k % tile.block_k == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        SPLIT_K=splits,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )
    if splits > 1:
        reduce_kernel[(triton.cdiv(n, _REDUCE_BLOCK), m)](
            target,
            x_scale,
            w_scale,
            bias_or_any,
            out,
            m,
            n,
            HAS_BIAS=bias is not None,
            SPLIT_K=splits,
            BLOCK_N=_REDUCE_BLOCK,
            num_warps=_REDUCE_WARPS,
            enable_fp_fusion=False,
        )
    return out
