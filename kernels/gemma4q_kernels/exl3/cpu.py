"""EXL3 with torch's vector operations: a block at a time, states looked up in a table of all 65536 values.

Weights are the reference's to the bit. Few rows of activations on a CPU go to `cpu_few_rows.py` where numba is
installed; what is said of `linear` here is for the rest. The scratch is 8 bytes a weight of a block, and what its words
take: some MB for a thread, whatever the weight's size. Runs on GPUs as well, where Triton is missing.

    linear        rotates activations, like the reference, and multiplies a few columns of tiles at a time:
                  [16 columns, (row of the tile, tile)], since the innermost axis is then as long as it can be
    reconstruct   [8 tiles, 16 rows, 16 columns, 8 tiles, blocks]: every stage of both transforms adds long rows

Measured on one thread (AVX-512), 5376 x 5376 at 4 bits, CPU time: linear takes 53 ms for a row (0.27 GB/s of packed
weights; dense float32: 8 ms) and 0.32 s for 512 rows (dense: 0.19 s), reconstruct 0.22 s. Good for looking at a
checkpoint and for tests, not for traffic (`cpu_few_rows.py`: 8 ms for a row).
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import cache

import torch

from gemma4q_kernels.exl3.format import Exl3Weight, Problem
from gemma4q_kernels.exl3.hadamard import STAGES
from gemma4q_kernels.exl3.reference import ring_positions, values, window_ends
from gemma4q_kernels.exl3_layout import BLOCK, TILE
from gemma4q_kernels.support import YES, Support

_TILES = BLOCK // TILE
# Weights of a block for each of torch's threads.
_BLOCK_WEIGHTS = 1 << 18
# torch looks up in a vector on one thread, 0.6 ns a weight, and in a matrix on all of them, 2.0 ns (AVX-512).
_THREADS_FOR_MATRIX = 4
# Rows of activations up to which `cpu_few_rows.py` takes less time: 45 to 65, more at few bits (a thread, AVX-512).
_FEW_ROWS = 48


def can_implement(problem: Problem) -> Support:
    """Always."""
    return YES


@cache
def _table(codebook: str, device: torch.device) -> torch.Tensor:
    return values(torch.arange(1 << 16, device=device), codebook).float()


@cache
def _windows(width: int, by_column: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every weight of a tile, by column or by row: its row in `_pairs`, int64 [256], and shift, int32 [256, 1]."""
    order = ring_positions().t() if by_column else ring_positions()
    ends = window_ends(width)[order.flatten()]
    last = (ends - 1) // 16
    return (last // 2 + (last % 2 == 0) * (width // 2)).to(device), (-ends % 16).int().unsqueeze(1).to(device)


def _words(trellis: torch.Tensor) -> torch.Tensor:
    """Words of the ring: int16 [in/16, out/16, 16 K] to int32 [in/16, out/16, 8 K], a view where torch can make one."""
    aligned = trellis if trellis.storage_offset() % 2 == 0 else trellis.clone()
    return aligned.contiguous().view(torch.int32)


def _pairs(words: torch.Tensor) -> torch.Tensor:
    """All pairs of neighbours among 16-bit units of the ring: int32 [A, 8 K, B] to int32 [A, 16 K, B].

    First those that are a word, then those of a word's lower half and the next one's upper half: the pairs that end in
    units 1, 3, 5 .. and in units 0, 2, 4 ..
    """
    across = (words.roll(1, 1) << 16) | ((words >> 16) & 0xFFFF)
    return torch.cat((words, across), dim=1)


def _in_a_block(weights: int, count: int) -> int:
    """How many of `count` pieces of so many weights make a block, which is one piece or more."""
    return max(1, min(count, _BLOCK_WEIGHTS * torch.get_num_threads() // weights))


def _scratch(weights: int, device: torch.device) -> torch.Tensor:
    """Room for `_decode`, used again for every block: fresh pages would take a fifth of the time."""
    return torch.empty((2, weights), dtype=torch.float32, device=device)


def _decode(words: torch.Tensor, by_column: bool, codebook: str, scratch: torch.Tensor) -> torch.Tensor:
    """Weights of tiles: int32 [A, 8 K, B] to float32 [A, 256, B], which lie in `scratch[1]`; `scratch[0]` is free."""
    index, shift = _windows(2 * words.shape[1], by_column, words.device)
    shape = (len(words), len(index), words.shape[2])
    room = scratch[:, : math.prod(shape)]
    state, weights = room[0].view(torch.int32), room[1]
    torch.index_select(_pairs(words), 1, index, out=state.view(shape))
    state.view(shape).bitwise_right_shift_(shift).bitwise_and_(0xFFFF)
    table = _table(codebook, words.device)
    if torch.get_num_threads() < _THREADS_FOR_MATRIX:
        torch.index_select(table, 0, state, out=weights)
    else:
        torch.index_select(table.unsqueeze(1), 0, state, out=weights.unsqueeze(1))
    return weights.view(shape)


def linear(x: torch.Tensor, shards: Sequence[Exl3Weight], bias: torch.Tensor | None) -> torch.Tensor:
    """See `gemma4q_kernels.exl3.linear`."""
    out = torch.cat([_multiply(x.float(), shard) for shard in shards], dim=-1)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _multiply(x: torch.Tensor, weight: Exl3Weight) -> torch.Tensor:
    """float32 [.., in] to float32 [.., out], as the transposed product."""
    words = _words(weight.trellis)
    rotated = _rotated((x.reshape(-1, weight.in_features) * weight.suh.float()).t())
    out = _product_of(rotated.shape[1], x.device, weight.codebook)(rotated, words, weight.codebook)
    return (_rotated(out).t() * (weight.svh.float() / BLOCK)).reshape(*x.shape[:-1], -1)


def _product_of(
    rows: int, device: torch.device, codebook: str
) -> Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor]:
    """What multiplies so many rows: `cpu_few_rows.multiply`, or the same of blocks.

    numba compiles at the first product, however many rows it has: while a server starts, not while it answers.
    """
    if device.type != "cpu" or not _has_numba():
        return _product_of_blocks
    from gemma4q_kernels.exl3 import cpu_few_rows

    cpu_few_rows.prepare(codebook)
    return cpu_few_rows.multiply if rows <= _FEW_ROWS else _product_of_blocks


@cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def _product_of_blocks(rotated: torch.Tensor, words: torch.Tensor, codebook: str) -> torch.Tensor:
    """float32 [in, M] and int32 [in/16, out/16, 8 K] to float32 [out, M]."""
    tiles, columns, _ = words.shape
    rotated = rotated.view(tiles, TILE, -1).transpose(0, 1).flatten(0, 1)
    out = torch.empty((TILE * columns, rotated.shape[1]), dtype=torch.float32, device=rotated.device)
    step = _in_a_block(tiles * TILE * TILE, columns)
    scratch = _scratch(step * tiles * TILE * TILE, rotated.device)
    for start in range(0, columns, step):
        part = words[:, start : start + step].permute(1, 2, 0).contiguous()
        block = _decode(part, True, codebook, scratch).view(-1, len(rotated))
        torch.mm(block, rotated, out=out[TILE * start : TILE * (start + step)])
    return out


def _rotated(x: torch.Tensor) -> torch.Tensor:
    """`hadamard.transform` along the first axis of float32 [features, M], which may be overwritten."""
    x = x.contiguous()
    return _butterflies(x, torch.empty_like(x), [distance * x.shape[1] for distance in STAGES])


def reconstruct(weight: Exl3Weight, dtype: torch.dtype) -> torch.Tensor:
    """See `gemma4q_kernels.exl3.reconstruct`."""
    words, suh, svh = _words(weight.trellis), weight.suh.float() / BLOCK, weight.svh.float()
    dense = torch.empty((weight.in_features, weight.out_features), dtype=dtype, device=words.device)
    step = BLOCK * _in_a_block(BLOCK * BLOCK, dense.shape[1] // BLOCK)
    scratch = _scratch(BLOCK * step, words.device)
    for row in range(0, len(dense), BLOCK):
        for column in range(0, dense.shape[1], step):
            rows, columns = slice(row, row + BLOCK), slice(column, column + step)
            tiles = words[row // TILE :, column // TILE :][:_TILES, : step // TILE]
            block = _transformed(tiles, weight.codebook, scratch)
            block.mul_(suh[rows].unsqueeze(1))
            _scale_columns(block, svh[columns], dense[rows, columns])
    return dense


def _transformed(tiles: torch.Tensor, codebook: str, scratch: torch.Tensor) -> torch.Tensor:
    """Words of 8 rows of tiles, whole blocks, to H What H: float32 [128, (16 columns, 8 tiles, blocks)].

    `hadamard.transform` along in, then along out: distances are of features, times what lies further in.
    """
    words = tiles.view(_TILES, -1, _TILES, tiles.shape[2]).permute(0, 3, 2, 1)
    blocks = words.shape[3]
    weights = _decode(words.flatten(2), False, codebook, scratch)
    rows = [distance * BLOCK for distance in STAGES]
    columns = [distance * _TILES for distance in STAGES if distance < TILE]
    rest = [distance // TILE for distance in STAGES if distance >= TILE]
    spare = scratch[0, : weights.numel()]
    return _butterflies(weights.view(-1), spare, [inner * blocks for inner in rows + columns + rest]).view(BLOCK, -1)


def _scale_columns(block: torch.Tensor, svh: torch.Tensor, dense: torch.Tensor) -> None:
    """Write a block, its columns in the order of `_transformed`, times their scales."""
    order = svh.view(-1, _TILES, TILE).permute(2, 1, 0)
    block.mul_(order.flatten())
    dense.view(BLOCK, -1, _TILES, TILE).copy_(block.view(BLOCK, *order.shape).permute(0, 3, 2, 1))


def _butterflies(x: torch.Tensor, spare: torch.Tensor, distances: Sequence[int]) -> torch.Tensor:
    """Sums and differences of elements that lie so far apart, stage by stage, to and fro: returns `x` or `spare`."""
    for distance in distances:
        low, high = x.view(-1, 2, distance).unbind(1)
        sums, differences = spare.view(-1, 2, distance).unbind(1)
        torch.add(low, high, out=sums)
        torch.sub(low, high, out=differences)
        x, spare = spare, x
    return x
