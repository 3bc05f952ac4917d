"""Choosing scales: from a distribution of magnitudes to the one number that E4M3 needs.

E4M3 is a floating-point format: over the 15 octaves of its normal range a larger scale costs no precision, while a
smaller one cuts off the largest values. So `absmax` loses little to the others, and they are here to be measured.

- `absmax`: absmax / 448. Nothing seen is cut off.
- `percentile`: the magnitude that 99.99 % of the values do not exceed, / 448.
- `mse`: the least sum of squared errors among scales from a quarter of absmax / 448 to twice it, 16 an octave.

Shards that an engine fuses keep their own scales, rounded up so that they differ from the largest of them by powers of
two: stock vLLM then rounds them again to that largest one without a loss (subnormal codes aside). This, too, costs
nothing in a floating-point format.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

import numpy as np

from vllm_gemma4q.fp8_static.format import MAX
from vllm_gemma4q.fp8_static.magnitudes import Magnitudes

PERCENTILE = 0.9999
# Of a tensor of zeros that has no siblings, and what a scale is never below (the smallest normal float32).
NEUTRAL_SCALE = 1.0
SMALLEST_SCALE = 2.0**-126
_STEPS_PER_OCTAVE = 16
_OCTAVES_BELOW, _OCTAVES_ABOVE = 2, 1


class Rule(StrEnum):
    """How a scale follows from a distribution."""

    ABSMAX = "absmax"
    PERCENTILE = "percentile"
    MSE = "mse"


def choose_scale(magnitudes: Magnitudes, rule: Rule) -> float:
    """A float32 value; 0 where there is nothing but zeros."""
    if magnitudes.absmax == 0:
        return 0.0
    return max(_as_float32(_RULES[rule](magnitudes)), SMALLEST_SCALE)


def _absmax(magnitudes: Magnitudes) -> float:
    return magnitudes.absmax / MAX


def _percentile(magnitudes: Magnitudes) -> float:
    return (magnitudes.percentile(PERCENTILE) or magnitudes.absmax) / MAX


def _least_squares(magnitudes: Magnitudes) -> float:
    steps = range(-_OCTAVES_BELOW * _STEPS_PER_OCTAVE, _OCTAVES_ABOVE * _STEPS_PER_OCTAVE + 1)
    candidates = [_as_float32(magnitudes.absmax / MAX * 2 ** (step / _STEPS_PER_OCTAVE)) for step in steps]
    return min(candidates, key=magnitudes.squared_error)


_RULES: Mapping[Rule, Callable[[Magnitudes], float]] = {
    Rule.ABSMAX: _absmax,
    Rule.PERCENTILE: _percentile,
    Rule.MSE: _least_squares,
}


def align(scales: Sequence[float]) -> list[float]:
    """Scales of fused shards, each at most doubled so that the largest is a power of two times it.

    Zeros (shards of zeros) take the largest, and `NEUTRAL_SCALE` where all are zero.
    """
    largest = max(scales)
    if largest == 0:
        return [NEUTRAL_SCALE] * len(scales)
    return [_below(largest, scale) if scale else largest for scale in scales]


def _below(largest: float, scale: float) -> float:
    """The smallest of largest, largest / 2, largest / 4 .. that is not below `scale`."""
    return math.ldexp(largest, -math.floor(math.log2(largest / scale)))


def _as_float32(value: float) -> float:
    return float(np.float32(value))
