"""Steps of colour: which of eight a figure is in, and what a legend says of them.

Bits have fixed steps, so that pages can be compared; errors and bytes are spread evenly over the logarithm of what the
page shows, since within one checkpoint they often differ by less than a fixed step.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STEPS = 8
_BITS = ((2.75, "2"), (3.75, "3"), (4.75, "4"), (5.75, "5"), (7.25, "6"), (12.0, "8"), (24.0, "16"), (math.inf, "32"))
_SAME = 1.05  # figures that differ by less than this factor are one step


@dataclass(frozen=True)
class Scale:
    """Upper bounds of the steps, the last of them infinite, and a label for each.

    Attributes:
        used: the steps that any figure is in: a legend shows no others.
    """

    bounds: Sequence[float]
    labels: Sequence[str]
    used: Sequence[int]

    def step(self, value: float) -> int:
        """0 to 7, larger for larger figures."""
        return next(index for index, bound in enumerate(self.bounds) if value <= bound)


def bits_scale(values: Iterable[float]) -> Scale:
    """Fixed steps around the usual numbers of bits."""
    bounds = [bound for bound, _ in _BITS]
    whole = Scale(bounds, [label for _, label in _BITS], ())
    return Scale(whole.bounds, whole.labels, sorted({whole.step(value) for value in values}))


def spread_scale(values: Sequence[float], words: Sequence[str], least_factor: float = 1.0) -> Scale:
    """Steps between the least and the largest of positive figures, evenly in their logarithm; infinite ones are in the
    last step.

    Args:
        words: each figure in words; a label is the least and the largest figure that is in the step.
        least_factor: between both ends of the steps, though the figures be closer.
    """
    positive = [value for value in values if 0 < value < math.inf]
    has_infinite = math.inf in values
    if not positive and not has_infinite:
        return Scale([math.inf], [""], [])
    least = min(positive, default=1.0)
    largest = max([*positive, least * least_factor])
    steps = STEPS if largest > least * _SAME or has_infinite else 1
    bounds = [least * (largest / least) ** (index / steps) for index in range(1, steps)]
    scale = Scale([*bounds, math.inf], [], [])
    found: dict[int, list[tuple[float, str]]] = {}
    for value, word in zip(values, words, strict=True):
        found.setdefault(scale.step(value), []).append((value, word))
    labels = [_label(found.get(index, [])) for index in range(steps)]
    return Scale(scale.bounds, labels, sorted(found))


def _label(members: Sequence[tuple[float, str]]) -> str:
    if not members:
        return ""
    least, largest = min(members)[1], max(members)[1]
    return least if least == largest else f"{least} to {largest}"
