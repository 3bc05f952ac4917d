"""Tiles worth timing, by band of M: a few dozen each. Larger spaces hold little more and take hours."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from gemma4q_kernels.int8_scaled_mm.tiles import Row, Tile

from vllm_gemma4q.benchmark.search import Choice, Problem


@dataclass(frozen=True)
class Band:
    """Problems with M up to `limit`.

    timed: M at which choices are timed; block_m: rows of a tile; splits: whether K may be divided.
    """

    limit: int | None
    timed: tuple[int, ...]
    block_m: tuple[int, ...]
    splits: bool = False


DENSE = (
    Band(16, (1, 16), (16,), splits=True),
    Band(32, (32,), (16, 32), splits=True),
    Band(64, (64,), (32, 64)),
    Band(256, (128, 256), (64, 128)),
    Band(None, (1024, 4096), (64, 128)),
)
# Of experts, M is the mean number of pairs an expert: 1 is decoding, where most have none.
EXPERTS = (
    Band(8, (1, 8), (16,)),
    Band(24, (24,), (16, 32)),
    Band(96, (64,), (32, 64)),
    Band(None, (256,), (64, 128)),
)

_BLOCK_N = {16: (32, 64, 128), 32: (64, 128), 64: (64, 128, 256), 128: (64, 128, 256)}
_BLOCK_K = {16: (64, 128, 256), 32: (64, 128), 64: (64, 128), 128: (64, 128)}
# Stages that hide memory's latency: AMD's registers hold the next step, NVIDIA's shared memory several.
_STAGES: Mapping[bool, Mapping[int, Sequence[int]]] = {
    True: {16: (2,), 32: (2,), 64: (2,), 128: (2,)},
    False: {16: (4,), 32: (3, 4), 64: (3, 4), 128: (3, 4)},
}
_VALUES_A_THREAD = (16, 256)  # int32 accumulators; beyond, a warp has too little to do or too few registers


def tiles(block_m: int, amd: bool) -> Iterator[Tile]:
    """Tiles of `block_m` rows for AMD or NVIDIA GPUs."""
    for block_n, block_k, stages in product(_BLOCK_N[block_m], _BLOCK_K[block_m], _STAGES[amd][block_m]):
        for warps in (2, 4, 8) if amd else (4, 8):
            values = block_m * block_n // (32 * warps)
            if _VALUES_A_THREAD[0] // (4 if block_m == 16 else 1) <= values < _VALUES_A_THREAD[1]:
                yield Tile(block_m=block_m, block_n=block_n, block_k=block_k, num_warps=warps, num_stages=stages)


def choices(band: Band, amd: bool, in_use: Iterable[Row], problems: Sequence[Problem]) -> list[Choice]:
    """What to time in a band, those that tables already choose for its problems included, each once."""
    found: dict[Choice, None] = {}
    for problem in problems:
        row = next(row for row in in_use if row.covers(*problem))
        found[Choice(row.tile, row.split_k)] = None
    for block_m in band.block_m:
        for tile in tiles(block_m, amd):
            found[Choice(tile, 1)] = None
            if band.splits:
                found[Choice(tile, "auto")] = None
    return list(found)
