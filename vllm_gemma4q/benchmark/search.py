"""From measured times to the rows of a tile table. Pure: no GPU, no clock.

Problems are put in bands of M. In each band one choice serves all, unless cutting the band at a size of N or K, and
once more on either side, makes it faster by more than `GAIN` on average: noise must not add rows. What is minimized is
the mean slowdown, a choice's time over the best time of that problem, so that small problems count like large ones.
Rows that change nothing are dropped.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from gemma4q_kernels.int8_scaled_mm.tiles import Row, Tile

GAIN = 0.03
_CUTS = 2  # one within the other


class Problem(NamedTuple):
    """[m, k] x [n, k]; of experts, m is the mean number of pairs an expert."""

    m: int
    n: int
    k: int


class Choice(NamedTuple):
    """What a row of a table sets."""

    tile: Tile
    split_k: int | Literal["auto"]


Times = Mapping[Problem, Mapping[Choice, float]]


@dataclass(frozen=True)
class _Part:
    """Rows of one part of a band, and the sum of slowdowns over its problems."""

    rows: tuple[Row, ...]
    cost: float


def rows_of(times: Times, limits: Sequence[int | None], one_block_m: bool = False) -> tuple[Row, ...]:
    """Rows of a table.

    Args:
        times: seconds of each choice at each problem; a choice that is absent cannot run there.
        limits: largest M of each band, ascending, the last None. Bands without problems are left to the next one.
        one_block_m: rows of a band must agree in `block_m`, as experts' must.

    Raises:
        ValueError: limits that are not ascending or do not end in None; no problem in the last band; problems of a band
            that no choice can all run.
    """
    sizes = [float("inf") if limit is None else limit for limit in limits]
    if not limits or limits[-1] is not None or sizes != sorted(set(sizes)):
        raise ValueError(f"limits: got {list(limits)}, expected ascending numbers and None at the end")
    bands: list[tuple[Row, ...]] = []
    for number, limit in enumerate(limits):
        least = sizes[number - 1] if number else 0
        problems = [problem for problem in times if least < problem.m <= sizes[number]]
        if problems:
            bands.append(_band(times, problems, limit, one_block_m))
        elif limit is None:
            raise ValueError(f"times: got no problem with M > {least}, expected at least one")
    kept = [band for band, after in pairwise(bands) if _without_m(band) != _without_m(after)]
    return _needed([row for band in (*kept, bands[-1]) for row in band])


def slowdowns(times: Times, rows: Sequence[Row]) -> dict[Problem, float]:
    """Time of what `rows` choose over the best time, by problem; problems at which that was not timed are left out."""
    found = {}
    for problem, by_choice in times.items():
        row = next(row for row in rows if row.covers(*problem))
        seconds = by_choice.get(Choice(row.tile, row.split_k))
        if seconds is not None:
            found[problem] = seconds / min(by_choice.values())
    return found


def _band(times: Times, problems: Sequence[Problem], limit: int | None, one_block_m: bool) -> tuple[Row, ...]:
    choices = {choice: None for problem in problems for choice in times[problem]}
    groups: Iterable[Collection[Choice]] = [choices]
    if one_block_m:
        sizes = sorted({choice.tile.block_m for choice in choices})
        groups = [[choice for choice in choices if choice.tile.block_m == size] for size in sizes]
    parts = [_divide(times, problems, group, {"max_m": limit}, _CUTS) for group in groups]
    runnable = [part for part in parts if part is not None]
    if not runnable:
        raise ValueError(f"times: got no choice that runs all of {[tuple(problem) for problem in problems]}")
    return min(runnable, key=lambda part: part.cost).rows


def _divide(
    times: Times,
    problems: Sequence[Problem],
    choices: Collection[Choice],
    limits: Mapping[str, int | None],
    cuts: int,
) -> _Part | None:
    """One row, or those of two parts where that pays; None where no choice runs all problems."""
    best = _one_row(times, problems, choices, limits)
    if not cuts:
        return best
    for axis in ("n", "k"):
        for cut in sorted({getattr(problem, axis) for problem in problems})[:-1]:
            low = [problem for problem in problems if getattr(problem, axis) <= cut]
            high = [problem for problem in problems if getattr(problem, axis) > cut]
            first = _divide(times, low, choices, {**limits, f"max_{axis}": cut}, cuts - 1)
            second = _divide(times, high, choices, limits, cuts - 1)
            if first is None or second is None:
                continue
            extra = len(first.rows) + len(second.rows) - (len(best.rows) if best else 0)
            cost = first.cost + second.cost
            if best is None or cost + GAIN * len(problems) * extra < best.cost:
                best = _Part((*first.rows, *second.rows), cost)
    return best


def _one_row(
    times: Times, problems: Sequence[Problem], choices: Collection[Choice], limits: Mapping[str, int | None]
) -> _Part | None:
    best: tuple[float, Choice] | None = None
    for choice in choices:
        if all(choice in times[problem] for problem in problems):
            cost = sum(times[problem][choice] / min(times[problem].values()) for problem in problems)
            if best is None or cost < best[0]:
                best = cost, choice
    return best and _Part((Row(**limits, tile=best[1].tile, split_k=best[1].split_k),), best[0])


def _without_m(band: Iterable[Row]) -> list[Row]:
    return [row.model_copy(update={"max_m": None}) for row in band]


def _needed(rows: list[Row]) -> tuple[Row, ...]:
    """Without rows whose problems the next row would treat the same."""
    needed: list[Row] = []
    for row in reversed(rows):
        after = needed[-1] if needed else None
        same = after is not None and (after.tile, after.split_k) == (row.tile, row.split_k)
        if not (same and after is not None and after.covers(*row.limits)):
            needed.append(row)
    return tuple(reversed(needed))
