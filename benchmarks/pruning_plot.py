"""The picture of `pruning.py`'s results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_gemma4q.pruned_moe.choose import RANDOM


def plot(levels: Mapping[str, Mapping[str, Any]], path: Path, goal: float) -> None:
    """Bars with intervals, the best on top; for random choices, their range; dashed, `goal` times v3 or REAP."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    for axes, (label, level) in zip(figure.subplots(1, len(levels)), levels.items(), strict=True):
        bars = {name: (row["mean_kld"], row["half_width"], row["half_width"]) for name, row in level["recipes"].items()}
        mean, low, high = (level[RANDOM][key] for key in ("mean_kld", "lowest", "highest"))
        bars[f"{RANDOM}, {level[RANDOM]['seeds']} seeds (range)"] = (mean, mean - low, high - mean)
        names = sorted(bars, key=lambda name: -bars[name][0])
        colors = ["tab:green" if "refit" in name else "tab:gray" if RANDOM in name else "tab:blue" for name in names]
        means, below, above = zip(*(bars[name] for name in names), strict=True)
        axes.barh(names, means, xerr=(below, above), color=colors, capsize=2)
        allowed = goal * min(level["recipes"][other]["mean_kld"] for other in ("v3", "reap"))
        axes.axvline(allowed, color="black", linestyle="--", linewidth=1, label=f"{goal} x the better of v3, reap")
        axes.set(title=f"{label} of the experts dropped", xlabel="mean KLD from the unpruned model, nats")
        axes.legend(loc="upper right")
    figure.savefig(path, dpi=110)
