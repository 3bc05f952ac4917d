"""The picture: divergence and perplexity against bits a weight and against GPU memory, one row of axes a figure.

Points are models, coloured by scheme, with one standard error; hollow where another engine ran them than the rest.
Lines are the original's perplexity and the noise floor: what its divergence from itself is, run again.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from gguf_mixed.sweep_plot import save
from vllm_gemma4q.compare.figures import Figures, TextGroup
from vllm_gemma4q.compare.labels import FONT_SIZE, place
from vllm_gemma4q.compare.model import Model, memory_bytes
from vllm_gemma4q.vram.engines import GIB
from vllm_gemma4q.vram.plot import context_label

_WIDTH, _ROW, _TITLE, _DOTS = 12.5, 3.9, 0.7, 120  # inches, and dots an inch
_TITLE_WIDTH = 130  # characters
_LABEL_WIDTH = 28
_GROUPS_OF_COLOURS = 10
_SEPARATORS = "-_. /"


@dataclass(frozen=True)
class _Figure:
    """One kind of figure: what to draw of a model, and which lines."""

    label: str
    value: Callable[[Figures], tuple[float, float] | None]
    is_logarithmic: bool


def _kld(figures: Figures) -> tuple[float, float] | None:
    return None if figures.divergence is None else (figures.divergence["mean_kld"], figures.divergence["error"])


def _perplexity(figures: Figures) -> tuple[float, float] | None:
    return None if figures.perplexity is None else (figures.perplexity["value"], figures.perplexity["error"])


_KLD = _Figure("KL divergence, mean nats a token", _kld, True)
_PERPLEXITY = _Figure("perplexity", _perplexity, False)


@dataclass(frozen=True)
class _Point:
    model: Model
    x: float
    value: float
    error: float
    is_hollow: bool


def drawable(group: TextGroup, models: Sequence[Model]) -> int:
    """How many models a group has points for, the original, which is a line, not counted."""
    return sum(any(_shown(figure, group, model) is not None for figure in (_KLD, _PERPLEXITY)) for model in models)


def plot(groups: Sequence[TextGroup], models: Sequence[Model], schemes: Sequence[str], tokens: int, path: Path) -> None:
    """Write a PNG of groups, one above the other; those without a point are left out, and one at least has some.

    Args:
        schemes: of each model, as the legend has them.
        tokens: the context that memory is for.

    Raises:
        InputError: `path` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [(group, _figures(group, models)) for group in groups if drawable(group, models)]
    heights = [_TITLE + _ROW * len(figures) for _, figures in rows]
    figure = Figure(figsize=(_WIDTH, sum(heights) + _TITLE), dpi=_DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    kinds = list(dict.fromkeys(schemes))
    colours = {
        model.path: f"C{kinds.index(kind) % _GROUPS_OF_COLOURS}" for model, kind in zip(models, schemes, strict=True)
    }
    names = dict(zip((model.path for model in models), short_names([model.name for model in models]), strict=True))
    waiting: list[tuple[Any, list[_Point], list[float]]] = []
    for part, (group, figures) in zip(parts, rows, strict=True):
        part.suptitle("\n".join(textwrap.wrap(group.title(), _TITLE_WIDTH)), fontsize=10)
        grid = part.subplots(len(figures), 2, sharey="row", squeeze=False)
        for each, (left, right) in zip(figures, grid, strict=True):
            for axes, x in ((left, _bits), (right, lambda model: _gib(model, tokens))):
                points = _points(each, group, models, x)
                waiting.append((axes, points, _draw(axes, each, group, points, colours)))
            left.set_ylabel(each.label)
        grid[-1, 0].set_xlabel("bits a weight, all of the text model")
        grid[-1, 1].set_xlabel(f"GiB of GPU memory, weights and KV cache at {context_label(tokens)} tokens")
    _legend(figure, kinds, groups)
    figure.canvas.draw()
    figure.set_layout_engine("none")
    for axes, points, lines in waiting:
        if points:
            texts = [names[point.model.path] for point in points]
            place(axes, [(point.x, point.value) for point in points], texts, lines)
    save(figure, path)


def short_names(names: Sequence[str]) -> list[str]:
    """Without the words that all begin with, and cut in the middle where too long for a label."""
    common = "".join(takewhile(bool, (_shared(letters) for letters in zip(*names, strict=False))))
    start = max((common.rfind(separator) + 1 for separator in _SEPARATORS), default=0)
    rests = [name[start:] for name in names]
    shortened = rests if len(names) > 1 and all(rests) else list(names)
    half = (_LABEL_WIDTH - 1) // 2
    return [name if len(name) <= _LABEL_WIDTH else f"{name[:half]}…{name[-half:]}" for name in shortened]


def _shared(letters: Sequence[str]) -> str:
    return letters[0] if len(set(letters)) == 1 else ""


def _figures(group: TextGroup, models: Sequence[Model]) -> list[_Figure]:
    found = (each for each in (_KLD, _PERPLEXITY))
    return [each for each in found if any(_shown(each, group, model) is not None for model in models)]


def _shown(figure: _Figure, group: TextGroup, model: Model) -> tuple[float, float] | None:
    """A model's figure where it can be drawn: the original is a line, and a logarithmic axis has no zero."""
    found = None if group.is_reference(model) else figure.value(group.of(model))
    if found is None or not math.isfinite(found[0]) or (figure.is_logarithmic and found[0] <= 0):
        return None
    return found


def _points(figure: _Figure, group: TextGroup, models: Sequence[Model], x: Callable[[Model], float]) -> list[_Point]:
    found = ((model, _shown(figure, group, model)) for model in models)
    return [
        _Point(model, x(model), shown[0], shown[1], group.of(model).engine is not None)
        for model, shown in found
        if shown is not None
    ]


def _draw(
    axes: Any, figure: _Figure, group: TextGroup, points: Sequence[_Point], colours: dict[Path, str]
) -> list[float]:
    """Points and lines; returns the lines' heights."""
    for point in points:
        colour = colours[point.model.path]
        filled = "white" if point.is_hollow else colour
        axes.errorbar(point.x, point.value, point.error, fmt="o", color=colour, mfc=filled, capsize=3)
    lines = []
    if figure.is_logarithmic:
        axes.set_yscale("log")
        floor = None if group.noise_floor is None else group.noise_floor["mean_kld"]
        if floor is not None and floor > 0:
            axes.axhline(floor, color="0.4", ls="--", lw=1)
            axes.axhspan(floor / 1e6, floor, color="0.9", zorder=0)
            _keep_limits(axes, [point.value for point in points], floor)
            lines.append(floor)
    elif group.reference_perplexity is not None:
        original = group.reference_perplexity["value"]
        axes.axhline(original, color="black", ls=":", lw=1.2)
        lines.append(original)
    axes.margins(x=0.15, y=0.15)
    axes.grid(True, which="major", alpha=0.3)
    return lines


def _keep_limits(axes: Any, values: Sequence[float], floor: float) -> None:
    """The area below the floor goes to the lower edge, which is not far below all that is shown."""
    axes.set_ylim(min([*values, floor]) / 2, max([*values, floor]) * 2)


def _legend(figure: Any, kinds: Sequence[str], groups: Sequence[TextGroup]) -> None:
    """Beside the axes, for everything but the names."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=f"C{index % _GROUPS_OF_COLOURS}", marker="o", ls="", label=kind)
        for index, kind in enumerate(kinds)
    ]
    if any(each.engine is not None for group in groups for each in group.figures.values()):
        handles.append(Line2D([], [], color="0.4", marker="o", mfc="white", ls="", label="run by another engine"))
    if any(group.reference_perplexity is not None for group in groups):
        handles.append(Line2D([], [], color="black", ls=":", label="the original"))
    if any(group.noise_floor is not None for group in groups):
        handles.append(Line2D([], [], color="0.4", ls="--", label="noise floor: the original run again"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), fontsize=FONT_SIZE + 1)


def _bits(model: Model) -> float:
    return model.bits


def _gib(model: Model, tokens: int) -> float:
    return memory_bytes(model.memory(tokens)[0], tokens) / GIB
