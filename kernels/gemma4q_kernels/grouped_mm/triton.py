"""INT8 experts in Triton for NVIDIA and AMD GPUs: two grouped multiplications with int32 accumulators.

    quantize tokens, sort pairs -> [pairs, 2I] -> act(gate) * up, quantize -> [pairs, H] * topk_weights -> sum over k

Six or seven launches, none of which synchronizes or has a grid that depends on the routing: they can be captured in a
CUDA graph. Sums over K are exact, the sum over a token's experts goes in the order of its slots: repeated runs agree to
the bit. Layouts: weights [E, N, K] and tokens [T, K] with unit stride along K; edges of N and K are masked.

Not done here: split-K, swapping the operands for few rows, quantizing in the epilogue.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
import torch
import triton
import triton.language as tl

from gemma4q_kernels.fused_quantize.triton import gated_quantize
from gemma4q_kernels.grouped_mm.problem import Problem
from gemma4q_kernels.grouped_mm.tiles import plan
from gemma4q_kernels.grouped_mm.triton_routing import Blocks, local_expert, route
from gemma4q_kernels.int8_scaled_mm.tiles import Tile
from gemma4q_kernels.int8_scaled_mm.triton import quantize_per_token
from gemma4q_kernels.support import Support, architecture, no, triton_support

_SUM_BLOCK = 1024


def can_implement(problem: Problem) -> Support:
    """A GPU (or the interpreter) with int8 matrix instructions."""
    support = triton_support(problem.device)
    if support and problem.device.type == "cuda":
        arch = architecture(problem.device)
        if arch.startswith("sm_") and int(arch.removeprefix("sm_")) < 80:
            return no(f"needs sm_80 or newer, got {arch}")
    return support


@triton.jit(do_not_specialize=["num_blocks"])
def grouped_mm_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    weights_ptr,
    out_ptr,
    pairs_ptr,
    block_experts_ptr,
    block_rows_ptr,
    num_blocks,
    N,
    K,
    stride_xm,
    stride_we,
    stride_wn,
    PAIRS_A_ROW: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_N] block of out[pair] = (x[pair // PAIRS_A_ROW] @ w[expert].T) * scales (* weights[pair])."""
    program = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    # Walk GROUP_M blocks of pairs column by column: neighbours often share an expert, and then weights in the cache.
    group = program // (GROUP_M * blocks_n)
    rows_in_group = tl.minimum(num_blocks - group * GROUP_M, GROUP_M)
    block = group * GROUP_M + (program % (GROUP_M * blocks_n)) % rows_in_group
    block_n = (program % (GROUP_M * blocks_n)) // rows_in_group
    rows = tl.load(block_rows_ptr + block)
    if rows == 0:
        return

    lanes = tl.arange(0, BLOCK_M)
    # Positions beyond the last row compute row 0 of x and are not stored: the loop needs no mask along M.
    pairs = tl.load(pairs_ptr + block * BLOCK_M + lanes, mask=lanes < rows, other=0)
    expert = tl.load(block_experts_ptr + block).to(tl.int64)
    offsets_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (pairs // PAIRS_A_ROW).to(tl.int64)[:, None] * stride_xm + offsets_k[None, :]
    w_ptrs = w_ptr + expert * stride_we + (offsets_n % N)[None, :] * stride_wn + offsets_k[:, None]

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

    x_scale = tl.load(x_scale_ptr + pairs // PAIRS_A_ROW, mask=lanes < rows, other=0.0)
    w_scale = tl.load(w_scale_ptr + expert * N + offsets_n, mask=offsets_n < N, other=0.0)
    out = accumulator.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    if WEIGHTED:
        out *= tl.load(weights_ptr + pairs, mask=lanes < rows, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + pairs.to(tl.int64)[:, None] * N + offsets_n[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(lanes[:, None] < rows) & (offsets_n[None, :] < N))


@triton.jit
def sum_slots_kernel(
    down_ptr,
    ids_ptr,
    map_ptr,
    out_ptr,
    H,
    stride_out,
    GLOBAL_EXPERTS,
    HAS_MAP: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Part of one token: the float32 sum of its slots, in their order; slots without a local expert are not read."""
    token = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        local = local_expert(ids_ptr, map_ptr, pair, pair >= 0, GLOBAL_EXPERTS, HAS_MAP)
        if local >= 0:
            total += tl.load(down_ptr + pair * H + offsets, mask=offsets < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * stride_out + offsets, total.to(out_ptr.dtype.element_ty), mask=offsets < H)


def grouped_scaled_mm(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    blocks: Blocks,
    out: torch.Tensor,
    tile: Tile,
    weights: torch.Tensor | None = None,
) -> None:
    """Multiply each pair with the weight of its expert: out[pair] = x[row of the pair] @ w[expert].T.

    Args:
        x_q, x_scale: int8 [T, K] and float32 [T, 1], T dividing the number of pairs: row = pair // (pairs / T).
        w_q, w_scale: int8 [E, N, K], float32 [E, N].
        blocks: from `route`, of tile.block_m positions each.
        out: float [pairs, N], contiguous. Rows of pairs without a local expert are left as they are.
        weights: float [pairs] to multiply rows with, or None.
    """
    n, k = w_q.shape[1:]
    num_blocks = len(blocks.rows)
    grouped_mm_kernel[(num_blocks * triton.cdiv(n, tile.block_n),)](
        x_q,
        x_scale,
        w_q,
        w_scale,
        x_scale if weights is None else weights,  # never read without weights, but Triton needs a pointer
        out,
        blocks.pairs,
        blocks.experts,
        blocks.rows,
        num_blocks,
        n,
        k,
        x_q.stride(0),
        w_q.stride(0),
        w_q.stride(1),
        PAIRS_A_ROW=len(out) // len(x_q),
        WEIGHTED=weights is not None,
        EVEN_K=k % tile.block_k == 0,
        BLOCK_M=blocks.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )


def run_experts(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w13_q: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_q: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    *,
    activation: str = "gelu_tanh",
    expert_map: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """The experts behind `moe_int8` for tokens that are quantized already, as engines hand them over.

    Args:
        x_q, x_scale: int8 [T, H] with unit stride along H, float32 [T, 1].
        w13_scale, w2_scale: float32 [E, 2I] and [E, H], or with a last dimension of one; contiguous.
        out: [T, H], written; unit stride along H.
        workspace: contiguous, at least T * k * max(2I, H) elements. [gate; up] and the outputs of experts are held in
            its dtype, the one after the other. None: allocated, in the dtype of `out`.

    The others are those of `moe_int8`. Nothing is checked here.
    """
    (tokens, top_k), (experts, rows, hidden) = topk_ids.shape, w13_q.shape
    pairs = tokens * top_k
    if not pairs:
        return out.zero_()
    known = experts if expert_map is None else len(expert_map)
    first, second = plan(architecture(x_q.device), -(-pairs // known), (rows, hidden), (hidden, rows // 2))
    if workspace is None:
        workspace = torch.empty(pairs * max(rows, hidden), dtype=out.dtype, device=out.device)
    blocks = route(topk_ids, experts, expert_map, first.block_m)

    gate_up = workspace.view(-1)[: pairs * rows].view(pairs, rows)
    grouped_scaled_mm(x_q, x_scale, w13_q, w13_scale, blocks, gate_up, first)
    y_q, y_scale = gated_quantize(gate_up, activation, "none")
    down = workspace.view(-1)[: pairs * hidden].view(pairs, hidden)
    grouped_scaled_mm(y_q, y_scale, w2_q, w2_scale, blocks, down, second, topk_weights.contiguous())

    block = min(_SUM_BLOCK, triton.next_power_of_2(hidden))
    sum_slots_kernel[(tokens, triton.cdiv(hidden, block))](
        down,
        topk_ids.contiguous(),
        topk_ids if expert_map is None else expert_map.contiguous(),
        out,
        hidden,
        out.stride(0),
        known,
        HAS_MAP=expert_map is not None,
        TOP_K=top_k,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def moe_int8(
    hidden: torch.Tensor,
    w13_q: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_q: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str = "gelu_tanh",
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `gemma4q_kernels.grouped_mm.moe_int8`. Values between the steps are held in the dtype of `hidden`."""
    x_q, x_scale = quantize_per_token(hidden)
    w13_q, w2_q = (w if w.stride(-1) == 1 else w.contiguous() for w in (w13_q, w2_q))
    return run_experts(
        x_q,
        x_scale,
        w13_q,
        w13_scale.contiguous(),
        w2_q,
        w2_scale.contiguous(),
        topk_weights,
        topk_ids,
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device),
        activation=activation,
        expert_map=expert_map,
    )
