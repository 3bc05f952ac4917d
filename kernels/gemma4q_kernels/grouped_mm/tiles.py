"""Launch parameters of the grouped kernel, from data files keyed by exact architecture.

`configs/<architecture>.json` in the format of `gemma4q_kernels.int8_scaled_mm.tiles`, or the same file in the folder
`grouped_mm` of the folder that GEMMA4Q_TILES names, which wins. Here `max_m` limits the mean number of pairs an expert
(tokens * k / experts, over all ranks), and K is not split.

The two multiplications of a layer share their blocks of pairs, so for each number of pairs all rows of a table must
agree in `block_m`, whatever their limits on N and K.
"""

import os
from functools import cache, lru_cache
from pathlib import Path

from gemma4q_kernels.int8_scaled_mm.tiles import OVERRIDE, Tile, TileTable, load, nearest

CONFIGS = Path(__file__).parent / "configs"


@cache
def _read(architecture: str, folder: str) -> TileTable:
    path = Path(folder) / "grouped_mm" / f"{architecture}.json"
    if not folder or not path.exists():
        path = CONFIGS / f"{nearest(architecture)[0]}.json"
    table = load(path)
    for number, row in enumerate(table.rows):
        if row.split_k != 1:
            raise ValueError(f"tile table {path}: rows.{number}.split_k: got {row.split_k!r}, expected 1")
    return table


def table(architecture: str) -> TileTable:
    """The tiles of an architecture, or of its nearest relative.

    Raises:
        ValueError: a file that deviates from the format.
    """
    return _read(architecture, os.environ.get(OVERRIDE, ""))


def plan(architecture: str, pairs: int, w13: tuple[int, int], w2: tuple[int, int]) -> tuple[Tile, Tile]:
    """Tiles of both multiplications.

    Args:
        pairs: mean number of pairs an expert, rounded up.
        w13, w2: (N, K) of each.

    Raises:
        ValueError: a file that deviates from the format, or whose rows disagree in `block_m`.
    """
    return _plan(architecture, os.environ.get(OVERRIDE, ""), pairs, w13, w2)


@lru_cache(maxsize=4096)
def _plan(architecture: str, folder: str, pairs: int, w13: tuple[int, int], w2: tuple[int, int]) -> tuple[Tile, Tile]:
    tiles = _read(architecture, folder)
    first, second = (tiles.plan(pairs, *shape)[0] for shape in (w13, w2))
    if first.block_m != second.block_m:
        raise ValueError(
            f"tile table {architecture}: {pairs} pairs an expert: got block_m {first.block_m} for N, K = {w13} and "
            f"{second.block_m} for {w2}, expected the same"
        )
    return first, second
