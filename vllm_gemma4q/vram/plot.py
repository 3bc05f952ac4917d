"""The table as a picture: GiB on one GPU against context, a line for each format and engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf_mixed.sweep_plot import save
from vllm_gemma4q.vram.engines import GIB
from vllm_gemma4q.vram.table import Row

_INCHES, _DOTS = (9, 6), 120
_STYLES = ("o-", "s--", "^:", "d-.")


def plot_rows(path: Path, model: str, rows: Sequence[Row], gpu_bytes: int | None) -> None:
    """Write a PNG: formats by colour, engines by line and marker, the GPU's memory as a horizontal line.

    Raises:
        InputError: `path` cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DOTS, layout="constrained")
    axes: Any = figure.add_subplot()
    schemes = list(dict.fromkeys(row.scheme for row in rows))
    engines = list(dict.fromkeys(row.engine for row in rows))
    for row in rows:
        style = _STYLES[engines.index(row.engine) % len(_STYLES)]
        totals = [row.total(tokens) / GIB for tokens in row.caches]
        label = f"{row.scheme}, {row.engine}"
        axes.plot(list(row.caches), totals, style, color=f"C{schemes.index(row.scheme)}", mfc="none", label=label)
    if gpu_bytes is not None:
        axes.axhline(gpu_bytes / GIB, color="black", linewidth=1, label=f"{gpu_bytes / GIB:g} GiB")
    contexts = list(rows[0].caches)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [context_label(tokens) for tokens in contexts])
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("GiB on one GPU: weights, KV cache, and other memory where it is known")
    axes.set_title(model)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)


def context_label(tokens: int) -> str:
    """`2K` for 2048, the number itself where it is no multiple of 1024."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
