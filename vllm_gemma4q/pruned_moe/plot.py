"""Scores by layer as a picture: how they fall off, and where the cut lies."""

from pathlib import Path
from typing import Any

import numpy as np

from gguf_mixed.drop_map import RetainedExperts
from gguf_mixed.sweep_plot import require_matplotlib, save
from vllm_gemma4q.calibration.statistics import Array

_INCHES_A_LAYER, _WIDTH, _MARGIN = 0.22, 9, 1.6


def plot_scores(path: Path, recipe: str, scores: Array, retained: RetainedExperts) -> None:
    """Write a picture: one row a layer, experts sorted by score, which is shown over the layer's largest.

    Raises:
        InputError: matplotlib is not installed, or `path` cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    n_layers, n_experts = scores.shape
    shares = -np.sort(-_from_zero(scores), axis=1)
    figure = Figure(figsize=(_WIDTH, _MARGIN + _INCHES_A_LAYER * n_layers), layout="constrained")
    axes: Any = figure.add_subplot()
    image = axes.imshow(shares, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
    edges = np.repeat(np.array(retained.counts) - 0.5, 2)
    rows = np.stack([np.arange(n_layers) - 0.5, np.arange(n_layers) + 0.5], axis=1).ravel()
    axes.plot(edges, rows, color="white", linewidth=1.5)
    axes.set(
        xlabel=f"experts of each layer, by score; right of the line: dropped ({n_experts} before)",
        ylabel="layer",
        title=f"{recipe}: score over the layer's largest",
    )
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, label="share of the largest score")
    save(figure, path)


def _from_zero(scores: Array) -> Array:
    """Scores over the layer's largest; shifted first where some are negative."""
    shifted = scores - np.minimum(scores.min(axis=1, keepdims=True), 0)
    return np.asarray(shifted / np.maximum(shifted.max(axis=1, keepdims=True), 1e-300))
