"""Tile shapes of the Triton kernel, by exact architecture and M.

A row is here because it compiles without spilling registers, which tests/numerics asserts for each of them; none has
been timed on the device it is for. A 256x256x64 tile spills 728 vector registers on gfx1100 (Triton 3.9).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Launch parameters: block of the output, step over K, warps, pipeline stages, rows of blocks that share L2."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8


# (largest M that the tile is for, tile), ascending; the last row serves every larger M.
Table = tuple[tuple[int, Tile], ...]

_ANY = 1 << 62
_DEFAULT: Table = (
    (16, Tile(16, 64, 128, 4, 2)),
    (64, Tile(64, 64, 64, 4, 2)),
    (_ANY, Tile(128, 128, 64, 8, 2)),
)
_HOPPER: Table = (
    (16, Tile(16, 64, 256, 4, 4)),
    (64, Tile(64, 64, 128, 4, 4)),
    (_ANY, Tile(128, 128, 128, 8, 3)),
)
TABLES: dict[str, Table] = {"sm_90": _HOPPER}


def table(architecture: str) -> Table:
    """The tiles of an architecture as `support.architecture` names it; conservative ones where it is unknown."""
    return TABLES.get(architecture, _DEFAULT)


def tile(architecture: str, m: int) -> Tile:
    """The tile for M rows of activations."""
    return next(shape for limit, shape in table(architecture) if m <= limit)
