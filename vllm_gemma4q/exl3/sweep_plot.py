"""The picture of a sweep: divergence, and perplexity, against bits a weight."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf_mixed.sweep_plot import save

_INCHES, _DOTS = (11, 5), 120


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of what `Sweep.run` returned.

    Raises:
        InputError: `path` cannot be written.
    """
    from matplotlib.figure import Figure

    points = sorted(results["points"].values(), key=lambda point: point["bpw"])
    bpw = [point["bpw"] for point in points]
    figure = Figure(figsize=_INCHES, dpi=_DOTS, layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, framing in zip(("C0", "C1"), results["protocol"]["windows"], strict=False):
        klds = [point["divergence"][framing] for point in points]
        means, errors = [kld["mean_kld"] for kld in klds], [kld["error"] for kld in klds]
        left.errorbar(bpw, means, errors, fmt="o-", color=color, capsize=3, label=framing)
        found = [point["perplexity"][framing]["value"] for point in points]
        right.plot(bpw, found, "o-", color=color, label=framing)
        right.axhline(
            results["reference"]["perplexity"][framing]["value"], color=color, ls=":", label=f"{framing}, original"
        )
    left.set_yscale("log")
    left.set_ylabel("KL divergence from the original, mean nats a token")
    right.set_ylabel("perplexity")
    for axes in (left, right):
        axes.set_xlabel("bits a weight of the layers, scales included")
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
    figure.suptitle(f"EXL3 of {Path(results['source']).name}")
    save(figure, path)
