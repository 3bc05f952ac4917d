"""The plot of a sweep: divergence against bits a weight, ours as lines and all else as labelled points."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gguf_mixed.atomic_file import replacing
from gguf_mixed.errors import InputError
from gguf_mixed.sweep_tiers import OPTIMAL

_INCHES, _DOTS = (9, 6), 120


def require_matplotlib(otherwise: str = "") -> None:
    """Raise InputError where there is no matplotlib, without importing it; `otherwise` ends the message."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"matplotlib: not installed: pip install 'vllm-gemma4q[evaluate]'{otherwise}")


def plot(results: Mapping[str, Any], title: str, path: Path) -> bool:
    """Write a PNG of what was predicted (hollow, dashed) and measured (filled, solid).

    Args:
        results: content of `results.json`.

    Returns:
        Whether there was anything to plot: neither is where the sensitivity was not measured and there is no text.
    """
    shown = [entry for entry in results["tiers"] if entry["predicted"] or entry["measured"]]
    if not shown:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DOTS, layout="constrained")
    axes = figure.add_subplot()
    _draw_optimal(axes, [entry for entry in shown if entry["recipe"] == OPTIMAL])
    _draw_others(axes, [entry for entry in shown if entry["recipe"] != OPTIMAL])
    axes.set_yscale("log")
    axes.margins(x=0.1)  # room for labels
    axes.set_xlabel("bits a weight, over all tensors")
    axes.set_ylabel("KL divergence from the reference, mean nats a token")
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    save(figure, path)
    return True


def save(figure: Any, target: Path | BinaryIO) -> None:
    """Write a figure as a PNG to a stream, or to a file, which appears only when it is whole; no display is needed.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    if not isinstance(target, Path):
        figure.savefig(target, format="png")
        return
    with replacing(target) as partial:
        figure.savefig(partial, format="png")


def _draw_optimal(axes: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    predicted = [(entry["bpw"], entry["predicted"]) for entry in entries if entry["predicted"]]
    measured = [_measured(entry) for entry in entries if entry["measured"]]
    if predicted:
        axes.plot(*zip(*predicted, strict=True), "o--", color="C0", mfc="none", label=f"{OPTIMAL}, predicted")
    if measured:
        bpw, kld, error = zip(*measured, strict=True)
        axes.errorbar(bpw, kld, error, fmt="o-", color="C0", capsize=3, label=f"{OPTIMAL}, measured")


def _draw_others(axes: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    predicted = [(entry["bpw"], entry["predicted"]) for entry in entries if entry["predicted"]]
    measured = [_measured(entry) for entry in entries if entry["measured"]]
    if predicted:
        axes.plot(*zip(*predicted, strict=True), "s", color="C1", mfc="none", label="other recipes, predicted")
    if measured:
        bpw, kld, error = zip(*measured, strict=True)
        axes.errorbar(bpw, kld, error, fmt="s", color="C1", capsize=3, label="other recipes, measured")
    for entry in entries:
        height = entry["measured"]["mean_kld"] if entry["measured"] else entry["predicted"]
        label = entry["name"].removeprefix("stock-").upper()
        axes.annotate(label, (entry["bpw"], height), textcoords="offset points", xytext=(6, 5), fontsize=8)


def _measured(entry: Mapping[str, Any]) -> tuple[float, float, float]:
    found = entry["measured"]
    return entry["bpw"], found["mean_kld"], found["mean_kld_error"]
