"""Launch parameters of the Triton kernel, from data files keyed by exact architecture.

`configs/<architecture>.json` (architecture as `support.architecture` names it), or the same file in the folder that
GEMMA4Q_TILES names, which wins. The file holds exactly the fields of `TileTable`:

    {"format": 1, "architecture": "gfx1100", "compute_units": 96,
     "provenance": {"gpu": "...", "estimated": true, "date": "2026-11-21", "versions": {"triton": "3.9.0"},
                    "method": "..."},
     "rows": [{"max_m": 16, "max_n": 8192, "split_k": "auto",
               "tile": {"block_m": 16, "block_n": 32, "block_k": 128, "num_warps": 2, "num_stages": 2}},
              ...,
              {"tile": {...}}]}

The first row whose limits hold is used; a limit that is left out holds for everything, and the last row has none.
`estimated` is false only where every row was timed on the GPU that is named. A file that deviates is an error that
names the file and the key. An architecture without a file borrows the one of its nearest relative.

Not done here: measuring. Reading a file is cached for the life of the process.
"""

import datetime
import os
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

CONFIGS = Path(__file__).parent / "configs"
OVERRIDE = "GEMMA4Q_TILES"

# A part of K shorter than this many steps spends its time filling the pipeline.
_STEPS_A_SPLIT = 4


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("expected a power of two")
    return value


def _date(value: str) -> str:
    datetime.date.fromisoformat(value)
    return value


_Block = Annotated[int, Field(ge=16, le=512), AfterValidator(_power_of_two)]
_Limit = Annotated[int, Field(ge=1)] | None
_Text = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Tile(_Strict):
    """Block of the output, step over K, warps, pipeline stages, rows of blocks that share the L2 cache."""

    block_m: _Block
    block_n: _Block
    block_k: _Block
    num_warps: Annotated[int, Field(ge=1, le=16), AfterValidator(_power_of_two)]
    num_stages: Annotated[int, Field(ge=1, le=8)]
    group_m: Annotated[int, Field(ge=1, le=64)] = 8


class Row(_Strict):
    """A tile and the problems it is for. split_k: parts of K, each summed by programs of its own, or "auto"."""

    max_m: _Limit = None
    max_n: _Limit = None
    max_k: _Limit = None
    tile: Tile
    split_k: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = 1

    @property
    def limits(self) -> tuple[float, float, float]:
        """Largest M, N and K, infinite where there is no limit."""
        m, n, k = (float("inf") if limit is None else float(limit) for limit in (self.max_m, self.max_n, self.max_k))
        return m, n, k

    def covers(self, m: float, n: float, k: float) -> bool:
        """Whether all three are within the limits."""
        return all(size <= limit for size, limit in zip((m, n, k), self.limits, strict=True))


class Provenance(_Strict):
    """Where the rows come from. versions: of what compiled or timed them; method: in a sentence."""

    gpu: _Text
    estimated: bool
    date: Annotated[str, AfterValidator(_date)]
    versions: dict[str, str]
    method: _Text


class TileTable(_Strict):
    """One data file. compute_units: SMs or CUs of the GPU that `provenance` names."""

    format: Literal[1]
    architecture: _Text
    compute_units: Annotated[int, Field(ge=1)]
    provenance: Provenance
    rows: Annotated[tuple[Row, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _every_row_is_reached(self) -> "TileTable":
        for number, row in enumerate(self.rows):
            for earlier in range(number):
                if self.rows[earlier].covers(*row.limits):
                    raise ValueError(f"rows.{number} is never reached: rows.{earlier} covers all it is for")
        last = len(self.rows) - 1
        if set(self.rows[last].limits) != {float("inf")}:
            raise ValueError(f"rows.{last} has a limit, expected none in the last row")
        return self

    def plan(self, m: int, n: int, k: int) -> tuple[Tile, int]:
        """Tile for [m, k] x [n, k], and the number of parts into which K is divided."""
        row = next(row for row in self.rows if row.covers(m, n, k))
        return row.tile, _splits(row, self.compute_units, m, n, k)


def _splits(row: Row, compute_units: int, m: int, n: int, k: int) -> int:
    """Parts of K: as many as give each compute unit a program, if none has one already.

    A second launch (1 to 2 us) and 8 * splits * m bytes a column buy the bandwidth of units that would idle. Beyond one
    program a unit they buy nothing: the stages of its pipeline keep enough loads in flight, about bandwidth x latency
    (H200: 4.3 TB/s x 0.8 us = 26 KB an SM; 7900 XTX: 9 KB a CU).
    """
    tile = row.tile
    steps = -(-k // tile.block_k)
    if row.split_k != "auto":
        return max(1, min(row.split_k, steps))
    blocks = -(-m // tile.block_m) * -(-n // tile.block_n)
    return max(1, min(-(-compute_units // max(blocks, 1)), steps // _STEPS_A_SPLIT))


def load(path: Path) -> TileTable:
    """Read one data file.

    Raises:
        ValueError: it is missing, not JSON, or deviates from `TileTable`; names the file and the first key.
    """
    try:
        table = TileTable.model_validate_json(path.read_text())
    except OSError as error:
        raise ValueError(f"tile table {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "table"
        raise ValueError(f"tile table {path}: {_shown(key)}: {_shown(first['msg'])}") from error
    if table.architecture != path.stem:
        got = _shown(table.architecture)
        raise ValueError(f"tile table {path}: architecture: got {got!r}, expected {path.stem!r}")
    return table


def _shown(text: str) -> str:
    """A key or a value of a file in an error: one line, not long."""
    return ascii(text)[1:-1][:200]


def packaged() -> tuple[str, ...]:
    """Architectures with a data file in this package, sorted."""
    return tuple(sorted(path.stem for path in CONFIGS.glob("*.json")))


def nearest(architecture: str) -> tuple[str, str]:
    """The packaged architecture that serves another one, and why (empty where it is the same).

    What decides is shared memory first (a tile that does not fit cannot launch), instructions second: sm_86 and
    sm_12x have the 99 KB of sm_89, sm_100 and sm_103 what sm_90 has.
    """
    if architecture in packaged():
        return architecture, ""
    if architecture.startswith("gfx12"):
        return "gfx1201", f"no tile table for {architecture}; gfx1201 has its instructions (RDNA4)"
    if architecture.startswith("gfx11"):
        return "gfx1101", f"no tile table for {architecture}; gfx1101 has its instructions (RDNA3)"
    if architecture in ("sm_100", "sm_103"):
        return "sm_90", f"no tile table for {architecture}; sm_90 has as much shared memory"
    if architecture.startswith("sm_"):
        return "sm_89", f"no tile table for {architecture}; sm_89 has the least shared memory of all"
    return "gfx1101", f"no tile table for the family of {architecture}; gfx1101 needs least of a GPU"


@cache
def _read(architecture: str, folder: str) -> tuple[TileTable, str]:
    if folder:
        if not Path(folder).is_dir():
            raise ValueError(f"{OVERRIDE}: got {folder!r}, expected a folder of tile tables")
        path = Path(folder) / f"{architecture}.json"
        if path.exists():
            return load(path), f"{path} ({OVERRIDE})"
    name, reason = nearest(architecture)
    return load(CONFIGS / f"{name}.json"), reason


def table(architecture: str) -> tuple[TileTable, str]:
    """The tiles of an architecture, and why they are not its packaged ones (empty where they are).

    Raises:
        ValueError: GEMMA4Q_TILES names no folder; as `load`.
    """
    return _read(architecture, os.environ.get(OVERRIDE, ""))


@lru_cache(maxsize=4096)
def _plan(architecture: str, folder: str, m: int, n: int, k: int) -> tuple[Tile, int]:
    return _read(architecture, folder)[0].plan(m, n, k)


def plan(architecture: str, m: int, n: int, k: int) -> tuple[Tile, int]:
    """`TileTable.plan` of the architecture's table, remembered: it is asked at every launch.

    Raises:
        ValueError: as `table`.
    """
    return _plan(architecture, os.environ.get(OVERRIDE, ""), m, n, k)
