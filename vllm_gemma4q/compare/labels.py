"""Labels beside points, none upon another: each takes the free place nearest to its point, further ones with a line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product, takewhile
from typing import Any

FONT_SIZE = 8
_LONGEST = 28  # characters
_SEPARATORS = "-_. /"
_POINTS_AN_INCH = 72
_RADII = (8, 13, 19, 26, 34, 43, 53, 65, 80, 98)  # points
_ANGLES = tuple(math.radians(degrees) for degrees in (40, 320, 140, 220, 90, 270, 0, 180, 20, 340, 160, 200, 65, 295))
_LINE_FROM = 16  # points between a label and its point from which on a line joins them
_MARKER = 4  # points around a point that no label covers
_BAR = 1  # points on both sides of a line
_OUTSIDE, _COVERED = 100.0, 30.0  # what a place costs for the share of the label outside the axes, or over something


@dataclass(frozen=True)
class Label:
    """A text for a point of the axes; `low` and `high` are the ends of its error bar."""

    text: str
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class _Box:
    left: float
    bottom: float
    width: float
    height: float

    def overlap(self, other: "_Box") -> float:
        """Shared area."""
        wide = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        high = min(self.bottom + self.height, other.bottom + other.height) - max(self.bottom, other.bottom)
        return max(wide, 0.0) * max(high, 0.0)


def short_names(names: Sequence[str]) -> list[str]:
    """Names without `.gguf` and the words that all begin with, cut in the middle where too long for a label.

    What would make two of them alike or leave nothing of one is not done.
    """
    stems = _distinct([name.removesuffix(".gguf") for name in names], names)
    common = "".join(takewhile(bool, (_shared(letters) for letters in zip(*stems, strict=False))))
    start = max(common.rfind(separator) + 1 for separator in _SEPARATORS)
    words = stems if len(names) == 1 else _distinct([stem[start:] for stem in stems], stems)
    half = (_LONGEST - 1) // 2
    return _distinct([word if len(word) <= _LONGEST else f"{word[:half]}…{word[-half:]}" for word in words], words)


def _distinct(names: Sequence[str], otherwise: Sequence[str]) -> list[str]:
    return list(names if all(names) and len(set(names)) == len(names) else otherwise)


def _shared(letters: Sequence[str]) -> str:
    return letters[0] if len(set(letters)) == 1 else ""


def place(axes: Any, labels: Sequence[Label], lines: Sequence[float] = ()) -> list[Any]:
    """Write labels into axes whose size and limits are final: the figure was drawn, and its layout is fixed.

    Args:
        lines: heights of horizontal lines that labels should not lie on.

    Returns:
        The annotations, in the order of `labels`.
    """
    scale = axes.figure.dpi / _POINTS_AN_INCH  # pixels a point
    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    inside = _Box(frame.x0, frame.y0, frame.width, frame.height)
    taken = [box for label in labels for box in _marks(axes, label, scale)]
    for height in lines:
        _, y = axes.transData.transform((labels[0].x, height))
        taken.append(_Box(frame.x0, y - _BAR * scale, frame.width, 2 * _BAR * scale))
    placed = []
    for label in labels:
        x, y = axes.transData.transform((label.x, label.y))
        drawn = axes.annotate(
            label.text, (label.x, label.y), (0, 0), textcoords="offset points", fontsize=FONT_SIZE, va="bottom"
        )
        size = drawn.get_window_extent(renderer)
        radius, box = _best((x, y), (size.width, size.height), scale, inside, taken)
        taken.append(box)
        drawn.set_position(((box.left - x) / scale, (box.bottom - y) / scale))
        if radius >= _LINE_FROM:
            _join(axes, label, box)
        placed.append(drawn)
    return placed


def _marks(axes: Any, label: Label, scale: float) -> list[_Box]:
    """What is drawn at a point, in pixels: the marker and the error bar."""
    (x, y), (_, low), (_, high) = axes.transData.transform(
        [(label.x, label.y), (label.x, max(label.low, axes.get_ylim()[0])), (label.x, label.high)]
    )
    marker, bar = _MARKER * scale, _BAR * scale
    return [
        _Box(x - marker, y - marker, 2 * marker, 2 * marker),
        _Box(x - 3 * bar, low - bar, 6 * bar, high - low + 2 * bar),
    ]


def _join(axes: Any, label: Label, box: _Box) -> None:
    """A thin line from the point to the nearest place of its label."""
    x, y = axes.transData.transform((label.x, label.y))
    end = (min(max(x, box.left), box.left + box.width), min(max(y, box.bottom), box.bottom + box.height))
    (right, up) = axes.transData.inverted().transform(end)
    axes.plot([label.x, right], [label.y, up], color="0.6", lw=0.7, zorder=1, scalex=False, scaley=False)


def _best(
    point: tuple[float, float], size: tuple[float, float], scale: float, inside: _Box, taken: Sequence[_Box]
) -> tuple[float, _Box]:
    """The cheapest place around a point in pixels: how far from it in points, and the box."""
    (x, y), (width, height) = point, size
    places = []
    for radius, angle in product(_RADII, _ANGLES):
        # The side of the label that faces the point lies at the radius; above and below, its middle does.
        left = x + radius * scale * math.cos(angle) - width * (1 - math.cos(angle)) / 2
        bottom = y + radius * scale * math.sin(angle) - height * (1 - math.sin(angle)) / 2
        box = _Box(left, bottom, width, height)
        area = width * height
        cost = radius / _RADII[-1] + _OUTSIDE * (1 - box.overlap(inside) / area)
        cost += _COVERED * sum(min(1.0, box.overlap(other) / area) for other in taken)
        places.append((cost, radius, box))
    _, radius, box = min(places, key=lambda each: each[0])
    return radius, box
