"""Sort routed pairs into blocks of one expert each, on the GPU: no synchronization, outputs of fixed size, no atomics.

A pair is one slot of one token, numbered token * k + slot. Each expert that has pairs gets whole blocks of BLOCK_M
positions, in the order of experts; its pairs fill them in ascending order, so that results do not depend on timing.

`pairs` [positions] is defined only where a block has rows: block b has `rows[b]` of them, none where it is unused.
Up to CHUNK pairs (all of decode) take one launch, more take two: one that counts, one that places.

Not done here: more experts than a block of counts holds in registers comfortably (some 512).
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from typing import NamedTuple

import torch
import triton
import triton.language as tl

CHUNK = 256  # pairs a program sorts
STEP = 32  # pairs it looks at together


class Blocks(NamedTuple):
    """Blocks of `block_m` positions: pairs int32 [blocks * block_m], experts and rows int32 [blocks]."""

    pairs: torch.Tensor
    experts: torch.Tensor
    rows: torch.Tensor
    block_m: int


@triton.jit
def local_expert(ids_ptr, map_ptr, offsets, mask, GLOBAL_EXPERTS, HAS_MAP: tl.constexpr):
    """Local experts at `offsets`: -1 for unused slots, experts of other ranks and ids out of range."""
    ids = tl.load(ids_ptr + offsets, mask=mask, other=-1).to(tl.int32)
    known = (ids >= 0) & (ids < GLOBAL_EXPERTS)
    if HAS_MAP:
        return tl.load(map_ptr + tl.where(known, ids, 0), mask=known, other=-1).to(tl.int32)
    return tl.where(known, ids, -1)


@triton.jit
def _one_hot(local, EXPERTS: tl.constexpr):
    """[STEP] -> bool [STEP, EXPERTS], a row of zeros for -1."""
    return local[:, None] == tl.arange(0, EXPERTS)[None, :]


@triton.jit
def _count(
    ids_ptr,
    map_ptr,
    start,
    stop,
    GLOBAL_EXPERTS,
    HAS_MAP: tl.constexpr,
    EXPERTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Pairs of each expert among pairs start..stop."""
    counts = tl.zeros((EXPERTS,), dtype=tl.int32)
    for first in range(start, stop, STEP):
        offsets = first + tl.arange(0, STEP)
        local = local_expert(ids_ptr, map_ptr, offsets, offsets < stop, GLOBAL_EXPERTS, HAS_MAP)
        counts += tl.sum(_one_hot(local, EXPERTS).to(tl.int32), axis=0)
    return counts


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,
    num_pairs,
    GLOBAL_EXPERTS,
    HAS_MAP: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Counts of one chunk of pairs: a row of int32 [chunks, EXPERTS]."""
    start = tl.program_id(0) * CHUNK
    stop = tl.minimum(start + CHUNK, num_pairs)
    counts = _count(ids_ptr, map_ptr, start, stop, GLOBAL_EXPERTS, HAS_MAP, EXPERTS, STEP)
    tl.store(counts_ptr + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS), counts)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def place_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,
    pairs_ptr,
    block_experts_ptr,
    block_rows_ptr,
    num_pairs,
    num_blocks,
    GLOBAL_EXPERTS,
    HAS_MAP: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Positions of one chunk's pairs, and a share of the table of blocks."""
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    start = chunk * CHUNK
    stop = tl.minimum(start + CHUNK, num_pairs)
    experts = tl.arange(0, EXPERTS)
    before = tl.zeros((EXPERTS,), dtype=tl.int32)
    if ONE_CHUNK:
        total = _count(ids_ptr, map_ptr, start, stop, GLOBAL_EXPERTS, HAS_MAP, EXPERTS, STEP)
    else:
        total = tl.zeros((EXPERTS,), dtype=tl.int32)
        for first in range(0, chunks, STEP):
            rows = first + tl.arange(0, STEP)[:, None]
            counts = tl.load(counts_ptr + rows * EXPERTS + experts[None, :], mask=rows < chunks, other=0)
            total += tl.sum(counts, axis=0)
            before += tl.sum(tl.where(rows < chunk, counts, 0), axis=0)
    blocks = tl.cdiv(total, BLOCK_M)
    ends = tl.cumsum(blocks, axis=0)
    firsts = (ends - blocks) * BLOCK_M  # first position of each expert

    position = firsts + before
    for first in range(start, stop, STEP):
        offsets = first + tl.arange(0, STEP)
        local = local_expert(ids_ptr, map_ptr, offsets, offsets < stop, GLOBAL_EXPERTS, HAS_MAP)
        one_hot = _one_hot(local, EXPERTS).to(tl.int32)
        earlier = tl.arange(0, STEP)[None, :] < tl.arange(0, STEP)[:, None]
        rank = tl.sum(((local[:, None] == local[None, :]) & earlier).to(tl.int32), axis=1)
        target = tl.sum(one_hot * position[None, :], axis=1) + rank
        tl.store(pairs_ptr + target, offsets, mask=local >= 0)
        position += tl.sum(one_hot, axis=0)

    last = firsts + total  # one beyond the last position that is filled
    for first in range(chunk * STEP, num_blocks, chunks * STEP):
        block = first + tl.arange(0, STEP)
        expert = tl.sum((ends[None, :] <= block[:, None]).to(tl.int32), axis=1)  # EXPERTS where the block is unused
        filled = tl.sum(_one_hot(expert, EXPERTS).to(tl.int32) * last[None, :], axis=1) - block * BLOCK_M
        tl.store(block_experts_ptr + block, expert, mask=block < num_blocks)
        tl.store(block_rows_ptr + block, tl.minimum(tl.maximum(filled, 0), BLOCK_M), mask=block < num_blocks)


def most_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Blocks that any routing of so many pairs can need."""
    return (num_pairs + min(num_experts, num_pairs) * (block_m - 1)) // block_m


def route(topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None, block_m: int) -> Blocks:
    """Sort the pairs of a batch into blocks.

    Args:
        topk_ids: int [T, k] with at least one pair, global ids. Those out of range count as unused: finding them would
            take a synchronization.
        num_experts: local experts.
        expert_map: int [global experts] -> local id or -1, or None: ids are local.
        block_m: positions a block, a power of two.
    """
    ids = topk_ids.contiguous()
    num_pairs, device = ids.numel(), ids.device
    chunks = triton.cdiv(num_pairs, CHUNK)
    num_blocks = most_blocks(num_pairs, num_experts, block_m)
    pairs, experts, rows = (
        torch.empty(size, dtype=torch.int32, device=device) for size in (num_blocks * block_m, num_blocks, num_blocks)
    )
    width = max(16, triton.next_power_of_2(num_experts))
    common = {
        "HAS_MAP": expert_map is not None,
        "EXPERTS": width,
        "CHUNK": CHUNK,
        "STEP": STEP,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }
    known = num_experts if expert_map is None else len(expert_map)
    table = ids if expert_map is None else expert_map.contiguous()  # never read without a map
    counts = experts  # never read where there is one chunk
    if chunks > 1:
        counts = torch.empty((chunks, width), dtype=torch.int32, device=device)
        count_kernel[(chunks,)](ids, table, counts, num_pairs, known, **common)
    place_kernel[(chunks,)](
        ids,
        table,
        counts,
        pairs,
        experts,
        rows,
        num_pairs,
        num_blocks,
        known,
        ONE_CHUNK=chunks == 1,
        BLOCK_M=block_m,
        **common,
    )
    return Blocks(pairs, experts, rows, block_m)
