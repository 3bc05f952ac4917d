"""The grid as the template draws it: modules down, layers across, three texts and three colours a cell."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from vllm_gemma4q.architecture import FULL_ATTENTION, Role
from vllm_gemma4q.report import words
from vllm_gemma4q.report.grid import Cell, Grid
from vllm_gemma4q.report.parts import Column
from vllm_gemma4q.report.scales import Scale, bits_scale, spread_scale

_ERROR_FACTOR = 10.0  # errors closer than that do not use all colours: small differences are no alarm
_NONE = "-"  # class of a cell without a figure in a view


@dataclass(frozen=True)
class Drawn:
    """A cell with its texts and classes.

    Attributes:
        bits, error, size: texts of the three views; a dash where there is no figure.
        classes: one a view: `b5 e2 s7`.
        facts: what the tooltip lists, in words.
    """

    cell: Cell
    bits: str
    error: str
    size: str
    classes: str
    attention: str
    facts: tuple[tuple[str, str], ...]

    @property
    def more(self) -> int:
        """Parts that are not named."""
        return self.cell.count - len(self.cell.names)


class GridView:
    """Texts, classes and legends of a grid."""

    def __init__(self, grid: Grid, has_errors: bool) -> None:
        self.grid = grid
        self.has_errors = has_errors
        cells = [*grid.cells.values(), *grid.outside.values()]
        self.unit, self._bytes = words.unit_of(max((cell.n_bytes for cell in cells), default=1) / 10)
        self.bits_scale = bits_scale([cell.bits for cell in cells if cell.bits is not None])
        errors = [cell.errors.median for cell in cells if cell.errors is not None]
        self.error_scale = spread_scale(errors, [words.error(value) for value in errors], least_factor=_ERROR_FACTOR)
        sizes = [float(cell.n_bytes) for cell in cells]
        self.size_scale = spread_scale(sizes, [words.size(value) for value in sizes])

    @property
    def is_full(self) -> list[bool]:
        return [kind == FULL_ATTENTION for kind in self.grid.layer_types]

    @property
    def n_full(self) -> int:
        return sum(self.is_full)

    @property
    def width(self) -> str:
        """Class of the table: few layers get wider cells; 60 just fit a laptop."""
        count = len(self.grid.layer_types)
        return "widest" if count <= 24 else "wide" if count <= 40 else "narrow"

    @property
    def rows(self) -> Iterator[tuple[Column, list[Drawn | None]]]:
        """A kind of module, and its cell in each layer; None where a layer has none."""
        for column in self.grid.columns:
            found = [self.grid.cells.get((layer, column)) for layer in range(len(self.grid.layer_types))]
            yield column, [None if cell is None else self._drawn(cell, index) for index, cell in enumerate(found)]

    @cached_property
    def outside(self) -> Mapping[Role, Drawn]:
        return {role: self._drawn(cell, None) for role, cell in self.grid.outside.items()}

    @property
    def legends(self) -> Iterator[tuple[str, str, list[tuple[int, str]]]]:
        """View, caption, and the steps in use with their labels."""
        views = [("b", "Bits stored a weight, scales and padding included, about", self.bits_scale)]
        if self.has_errors:
            caption = "Relative squared error (of several matrices the median); in cells its decibels"
            views.append(("e", caption, self.error_scale))
        views.append(("s", f"Bytes stored; in cells {self.unit}", self.size_scale))
        for view, caption, scale in views:
            yield view, caption, [(step, scale.labels[step]) for step in scale.used]

    def _drawn(self, cell: Cell, layer: int | None) -> Drawn:
        error = None if cell.errors is None else cell.errors.median
        steps = (
            ("b", self.bits_scale, cell.bits),
            ("e", self.error_scale, error),
            ("s", self.size_scale, cell.n_bytes),
        )
        kind = self.grid.layer_types[layer] if layer is not None else ""
        return Drawn(
            cell=cell,
            bits="–" if cell.bits is None else words.bits(cell.bits),
            error="–" if error is None else words.decibels(error),
            size=words.short(cell.n_bytes, self._bytes),
            classes=" ".join(_class(*step) for step in steps),
            attention=kind.replace("_", " "),
            facts=tuple(_facts(cell, self.has_errors)),
        )


def _class(view: str, scale: Scale, value: float | None) -> str:
    return f"{view}{_NONE if value is None else scale.step(value)}"


def _facts(cell: Cell, has_errors: bool) -> Iterator[tuple[str, str]]:
    yield "dtype", _counted(cell.dtypes)
    yield "shape", _counted(cell.shapes)
    if cell.scales:
        yield "scales", _counted(cell.scales)
    yield "parameters", f"{cell.parameters:,}"
    yield "bytes", f"{cell.n_bytes:,}"
    yield "bits a weight", "nothing but scales" if cell.bits is None else words.bits(cell.bits, 4)
    if has_errors:
        yield "error", _error(cell)
    yield from ((name, f"{value:.4g}") for name, value in cell.notes.items())


def _error(cell: Cell) -> str:
    if cell.errors is None:
        return "not measured" if cell.quantized else "not quantized"
    spread, middle = cell.errors, words.error(cell.errors.median)
    if spread.count == 1 and not math.isfinite(spread.median):
        return f"{middle}: a weight or a scale is no number"
    if spread.count == 1:
        return f"{middle} ({words.decibels(spread.median)} dB)"
    return f"{words.error(spread.least)} to {words.error(spread.largest)}, median {middle}, of {spread.count} matrices"


def _counted(found: Mapping[str, int]) -> str:
    """The most frequent first; how often each where there are several."""
    ordered = sorted(found.items(), key=lambda item: -item[1])
    texts = [name if count == 1 else f"{count:,} × {name}" for name, count in ordered[:4]]
    return ", ".join(texts) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")
