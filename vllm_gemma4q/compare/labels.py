"""Labels beside points, none upon another: each takes the free place nearest to its point, further ones with a line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

FONT_SIZE = 8
_POINTS_AN_INCH = 72
_RADII = (9, 16, 26, 38, 52, 68, 86)  # points
_ANGLES = tuple(math.radians(degrees) for degrees in (40, 320, 140, 220, 90, 270, 0, 180, 65, 295, 115, 245))
_LINE_FROM = 16  # points between a label and its point from which on a line joins them
_MARKER = 5  # points around a point that no label covers
_OUTSIDE, _COVERED = 100.0, 10.0  # what a place costs for each share of the label outside the axes, or over something


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


def place(axes: Any, points: Sequence[tuple[float, float]], texts: Sequence[str], lines: Sequence[float] = ()) -> None:
    """Label points of axes whose size and limits are final: the figure was drawn, and its layout is fixed.

    Args:
        points: in data coordinates.
        lines: heights of horizontal lines that labels should not lie on.
    """
    scale = axes.figure.dpi / _POINTS_AN_INCH
    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    inside = _Box(frame.x0, frame.y0, frame.width, frame.height)
    pixels = axes.transData.transform(list(points))
    reach = _MARKER * scale
    taken = [_Box(x - reach, y - reach, 2 * reach, 2 * reach) for x, y in pixels]
    for height in lines:
        y = axes.transData.transform((points[0][0], height))[1]
        taken.append(_Box(frame.x0, y - scale, frame.width, 2 * scale))
    for (x, y), point, text in zip(pixels, points, texts, strict=True):
        label = axes.annotate(text, point, (0, 0), textcoords="offset points", fontsize=FONT_SIZE)
        size = label.get_window_extent(renderer)
        radius, box = _best(x, y, size.width, size.height, scale, inside, taken)
        taken.append(box)
        label.remove()
        offset = ((box.left - x) / scale, (box.bottom - y) / scale)
        arrow = {"arrowstyle": "-", "color": "0.5", "lw": 0.6, "shrinkA": 1, "shrinkB": 3}
        axes.annotate(
            text,
            point,
            offset,
            textcoords="offset points",
            fontsize=FONT_SIZE,
            va="bottom",
            arrowprops=arrow if radius >= _LINE_FROM else None,
        )


def _best(
    x: float, y: float, width: float, height: float, scale: float, inside: _Box, taken: Sequence[_Box]
) -> tuple[float, _Box]:
    """The cheapest place around a point in pixels: how far from it in points, and the box."""
    places = []
    for radius, angle in product(_RADII, _ANGLES):
        right, up = radius * scale * math.cos(angle), radius * scale * math.sin(angle)
        # The side of the label that faces the point lies at the radius; above and below, its middle does.
        left = x + right - width * (1 - math.cos(angle)) / 2
        bottom = y + up - height * (1 - math.sin(angle)) / 2
        box = _Box(left, bottom, width, height)
        area = width * height
        cost = radius / _RADII[-1] + _OUTSIDE * (1 - box.overlap(inside) / area)
        cost += _COVERED * sum(min(1.0, box.overlap(other) / area) for other in taken)
        places.append((cost, radius, box))
    _, radius, box = min(places, key=lambda each: each[0])
    return radius, box
