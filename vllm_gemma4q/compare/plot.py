"""The picture: divergence and perplexity against bits a weight and against GPU memory, two axes a figure and group.

Points are models, coloured by scheme, with one standard error; hollow where another engine ran them than the rest.
Lines are the original's perplexity and the noise floor, its divergence from itself. Not drawn: a
divergence of nothing, for which a logarithmic axis has no place.
"""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gguf_mixed.sweep_plot import save
from vllm_gemma4q.compare.figures import Figures, TextGroup
from vllm_gemma4q.compare.labels import FONT_SIZE, Label, place, short_names
from vllm_gemma4q.compare.model import Model, memory_bytes
from vllm_gemma4q.vram.engines import GIB
from vllm_gemma4q.vram.plot import context_label

_WIDTH, _ROW, _TITLE, _DOTS = 12.5, 3.9, 0.7, 120  # inches, and dots an inch
_TITLE_WIDTH = 130  # characters
_COLOURS = 10  # of matplotlib's cycle
_LEGEND_COLUMNS = 5


@dataclass(frozen=True)
class _Kind:
    """A kind of figure: its axis, and how it is read from a model's figures."""

    label: str
    value: Callable[[Figures], tuple[float, float] | None]
    is_logarithmic: bool


def _kld(figures: Figures) -> tuple[float, float] | None:
    return None if figures.divergence is None else (figures.divergence["mean_kld"], figures.divergence["error"])


def _perplexity(figures: Figures) -> tuple[float, float] | None:
    return None if figures.perplexity is None else (figures.perplexity["value"], figures.perplexity["error"])


_KINDS = (_Kind("KL divergence, mean nats a token", _kld, True), _Kind("perplexity", _perplexity, False))


@dataclass(frozen=True)
class _Style:
    """What is the same in all axes: colours and labels by the models' paths."""

    colours: dict[Path, str]
    names: dict[Path, str]


def drawable(group: TextGroup, models: Sequence[Model]) -> list[Model]:
    """Models that a group has points for; the original is a line."""
    return [model for model in models if any(_shown(kind, group, model) for kind in _KINDS)]


def plot(
    groups: Sequence[TextGroup],
    models: Sequence[Model],
    schemes: Sequence[str],
    tokens: int,
    target: Path | BinaryIO,
) -> None:
    """Write a PNG of groups, one above the other; each has a point at least.

    Args:
        schemes: of each model, as the legend has them.
        tokens: the context that memory is for.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = {model.path for group in groups for model in drawable(group, models)}
    of_model = {model.path: scheme for model, scheme in zip(models, schemes, strict=True) if model.path in drawn}
    colours = {scheme: f"C{index % _COLOURS}" for index, scheme in enumerate(dict.fromkeys(of_model.values()))}
    names = short_names([model.name for model in models if model.path in drawn])
    style = _Style({key: colours[scheme] for key, scheme in of_model.items()}, dict(zip(of_model, names, strict=True)))
    heights = [_TITLE + _ROW * len(_kinds(group, models)) for group in groups]
    figure = Figure(figsize=(_WIDTH, sum(heights) + _TITLE), dpi=_DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    to_label = []
    for part, group in zip(parts, groups, strict=True):
        to_label += _draw_group(part, group, models, tokens, style)
    _legend(figure, colours, groups)
    figure.canvas.draw()  # which sets sizes and limits, so that labels can be placed
    figure.set_layout_engine("none")
    for axes, labels, lines in to_label:
        place(axes, labels, lines)
    save(figure, target)


def _draw_group(
    part: Any, group: TextGroup, models: Sequence[Model], tokens: int, style: _Style
) -> list[tuple[Any, list[Label], list[float]]]:
    """Axes of one group; returns what is to be labelled in each, and the lines to keep clear of."""
    part.suptitle("\n".join(textwrap.wrap(group.title(), _TITLE_WIDTH)), fontsize=10)
    kinds = _kinds(group, models)
    grid = part.subplots(len(kinds), 2, sharey="row", squeeze=False)
    drawn = []
    for kind, row in zip(kinds, grid, strict=True):
        row[0].set_ylabel(kind.label)
        for axes, x in zip(row, (_bits, lambda model: _gib(model, tokens)), strict=True):
            labels = _draw_points(axes, kind, group, models, x, style)
            drawn.append((axes, labels, _draw_lines(axes, kind, group)))
    grid[-1, 0].set_xlabel("bits a weight, all of the text model")
    grid[-1, 1].set_xlabel(f"GiB of GPU memory, weights and KV cache at {context_label(tokens)} tokens")
    return drawn


def _draw_points(
    axes: Any,
    kind: _Kind,
    group: TextGroup,
    models: Sequence[Model],
    x: Callable[[Model], float],
    style: _Style,
) -> list[Label]:
    labels = []
    for model in models:
        if (shown := _shown(kind, group, model)) is None:
            continue
        (value, error), colour = shown, style.colours[model.path]
        filled = colour if group.of(model).engine is None else "white"
        axes.errorbar(x(model), value, error, fmt="o", color=colour, mfc=filled, capsize=3)
        labels.append(Label(style.names[model.path], x(model), value, value - error, value + error))
    if kind.is_logarithmic:
        axes.set_yscale("log")
    axes.margins(x=0.15, y=0.2)
    axes.grid(True, which="major", alpha=0.3)
    return labels


def _draw_lines(axes: Any, kind: _Kind, group: TextGroup) -> list[float]:
    """The original and the noise floor; returns their heights."""
    if not kind.is_logarithmic:
        if group.reference_perplexity is None:
            return []
        height = group.reference_perplexity["value"]
        axes.axhline(height, color="black", ls=":", lw=1.2)
        return [height]
    height = 0 if group.noise_floor is None else group.noise_floor["mean_kld"]
    if height <= 0:
        return []
    axes.axhline(height, color="0.4", ls="--", lw=1)
    low = min(axes.get_ylim()[0], height / 2)
    axes.axhspan(low, height, color="0.93", zorder=0)
    axes.set_ylim(bottom=low)
    return [height]


def _kinds(group: TextGroup, models: Sequence[Model]) -> list[_Kind]:
    return [kind for kind in _KINDS if any(_shown(kind, group, model) for model in models)]


def _shown(kind: _Kind, group: TextGroup, model: Model) -> tuple[float, float] | None:
    """A model's figure and its standard error, where it is a point."""
    found = None if group.is_reference(model) else kind.value(group.of(model))
    if found is None or (kind.is_logarithmic and found[0] <= 0):
        return None
    return found


def _legend(figure: Any, colours: dict[str, str], groups: Sequence[TextGroup]) -> None:
    """Below all axes; models are named beside their points."""
    from matplotlib.lines import Line2D

    def entry(label: str, **how: Any) -> Line2D:
        return Line2D([], [], label=label, **how)

    entries = [entry(scheme, color=colour, marker="o", ls="") for scheme, colour in colours.items()]
    if any(each.engine is not None for group in groups for each in group.figures.values()):
        entries.append(entry("run by another engine", color="0.4", marker="o", mfc="white", ls=""))
    if any(group.reference_perplexity is not None for group in groups):
        entries.append(entry("the original", color="black", ls=":"))
    if any(group.noise_floor is not None for group in groups):
        entries.append(entry("noise floor: the original from itself", color="0.4", ls="--"))
    columns = min(len(entries), _LEGEND_COLUMNS)
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=FONT_SIZE + 1)


def _bits(model: Model) -> float:
    return model.bits


def _gib(model: Model, tokens: int) -> float:
    return memory_bytes(model.memory(tokens)[0], tokens) / GIB
