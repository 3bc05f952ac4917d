"""Contenders beside each other, by shape and M: median time, bandwidth, operations, ratio to bfloat16, error.

The weights of one shape are held at once, in turn beyond the cache; contenders take turns in rounds, so that a machine
that slows down or is shared slows them all. Weights are random numbers: their time does not depend on them.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from gemma4q_kernels.int8_scaled_mm import quantize_per_channel

from vllm_gemma4q.benchmark.contenders import BASELINE, CONTENDERS, Contender, Linear, Weight
from vllm_gemma4q.benchmark.shapes import Shape
from vllm_gemma4q.benchmark.timing import copies_beyond_cache, time_calls

_ROUNDS = 3
_DRAWN_ROWS = 512  # of a weight are drawn, the others repeat them


@dataclass(frozen=True)
class Row:
    """One contender at one problem.

    seconds: median of a call; gb_per_s: of the weight, read once; tops: 2 * M * N * K operations in that time;
    ratio: of bfloat16's time to this; error: RMS of the difference from bfloat16's output over RMS of that.
    All None where `reason` says why it did not run.
    """

    shape: Shape
    m: int
    contender: str
    seconds: float | None = None
    gb_per_s: float | None = None
    tops: float | None = None
    ratio: float | None = None
    error: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds for each contender at each problem, and copies of a weight (None: beyond cache)."""

    seconds: float = 0.6
    copies: int | None = None


QUICK = Effort(seconds=0.01, copies=1)


def compare(
    shapes: Iterable[Shape],
    m_values: Sequence[int],
    device: torch.device,
    effort: Effort = Effort(),
    contenders: Sequence[Contender] = CONTENDERS,
    done: Callable[[], object] = lambda: None,
) -> Iterator[Row]:
    """Rows of each shape and M, bfloat16 first; `done` is called after each M."""
    for shape in shapes:
        copies = effort.copies or copies_beyond_cache(shape.n * shape.k, device)
        weights = [_weight(shape, device) for _ in range(copies)]
        able = [contender for contender in contenders if any(contender.can_run(device, m) for m in m_values)]
        ready = {contender.name: _prepared(contender, weights, m_values[0]) for contender in able}
        for m in m_values:
            yield from _at(shape, m, device, effort.seconds, contenders, ready)
            done()


def _weight(shape: Shape, device: torch.device) -> Weight:
    drawn = torch.randn(min(shape.n, _DRAWN_ROWS), shape.k, dtype=torch.bfloat16, device=device)
    bf16 = drawn.repeat(-(-shape.n // len(drawn)), 1)[: shape.n].contiguous()
    return Weight(bf16, *quantize_per_channel(bf16))


def _prepared(contender: Contender, weights: Sequence[Weight], m: int) -> list[Linear] | str:
    """The contender with each weight, or why it refuses."""
    try:
        return [contender.prepare(weight) for weight in weights]
    except (RuntimeError, ValueError) as error:
        return _first_line(error)


def _at(
    shape: Shape,
    m: int,
    device: torch.device,
    budget: float,
    contenders: Sequence[Contender],
    ready: dict[str, list[Linear] | str],
) -> Iterator[Row]:
    x = torch.randn(m, shape.k, dtype=torch.bfloat16, device=device)
    reasons: dict[str, str] = {}
    running: dict[str, list[Linear]] = {}
    errors: dict[str, float] = {}
    expected: torch.Tensor | None = None
    for contender in contenders:
        refusal = contender.can_run(device, m).reason
        linears = refusal or ready[contender.name]
        if isinstance(linears, str):
            reasons[contender.name] = linears
            continue
        try:
            out = linears[0](x).float()
        except (RuntimeError, ValueError) as error:  # an operator that refuses this shape
            reasons[contender.name] = _first_line(error)
            continue
        expected = out if expected is None else expected
        errors[contender.name] = float((out - expected).norm() / expected.norm())
        running[contender.name] = linears
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(_ROUNDS):
        for name, linears in running.items():
            times[name] += time_calls([partial(linear, x) for linear in linears], device, budget / _ROUNDS)
    medians = {name: statistics.median(found) for name, found in times.items()}
    for contender in contenders:
        if contender.name in reasons:
            yield Row(shape, m, contender.name, reason=reasons[contender.name])
            continue
        seconds = medians[contender.name]
        yield Row(
            shape,
            m,
            contender.name,
            seconds,
            gb_per_s=shape.n * shape.k * contender.bytes_a_weight / seconds / 1e9,
            tops=2 * m * shape.n * shape.k / seconds / 1e12,
            ratio=medians[BASELINE] / seconds if BASELINE in medians else None,
            error=errors[contender.name],
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
