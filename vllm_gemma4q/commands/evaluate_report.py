"""What `gemma4q evaluate perplexity|divergence` prints."""

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH = 140
_NOISE = "float32"
_ERRORS = 2


def console_width() -> int | None:
    """Of tables: the terminal's, and enough for all columns in a pipe."""
    return None if sys.stdout.isatty() else _WIDTH


def show(result: dict[str, Any], as_json: bool) -> None:
    """One JSON document, or a table and what it tells."""
    if as_json:
        print(json.dumps(result))
        return
    console = Console(width=console_width())
    console.print(_table(result))
    for line in _sentences(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(result: dict[str, Any]) -> Table:
    table = Table("checkpoint", "text", "perplexity", "KLD mean", "median", "p99", "p99.9", "same top", "positions")
    floor = result.get("noise_floor", {})
    for name, found in result["checkpoints"].items():
        for framing, ppl in found["perplexity"].items():
            perplexity, positions = f"{ppl['value']:.4f} ± {ppl['error']:.4f}", f"{ppl['positions']:,}"
            kld = found.get("divergence", {}).get(framing)
            table.add_row(name, framing, perplexity, *_divergence(kld), positions)
        if name == result.get("reference"):
            for framing, kld in floor.items():
                table.add_row(f"  in {_NOISE}: the noise floor", framing, "", *_divergence(kld), "")
    return table


def _divergence(kld: dict[str, float] | None) -> list[str]:
    if kld is None:
        return [""] * 5
    figures = [
        f"{kld['mean_kld']:.5f} ± {kld['error']:.5f}",
        *(f"{kld[key]:.5f}" for key in ("median_kld", "p99_kld", "p999_kld")),
    ]
    return [*figures, f"{kld['same_top']:.2%}"]


def _is_noise(kld: dict[str, float], floor: dict[str, float]) -> bool:
    """The errors are taken for independent; over the same positions they are smaller than that."""
    return kld["mean_kld"] - floor["mean_kld"] <= _ERRORS * math.hypot(kld["error"], floor["error"])


def _sentences(result: dict[str, Any]) -> Iterator[str]:
    for framing, floor in result.get("noise_floor", {}).items():
        for name, found in result["checkpoints"].items():
            kld = found.get("divergence", {}).get(framing)
            if kld and _is_noise(kld, floor):
                yield (
                    f"{name} ({framing}): indistinguishable from the reference: no further from it than the reference "
                    f"is from itself in {_NOISE}, within {_ERRORS} standard errors"
                )
    engines = {name: found["engine"] for name, found in result["checkpoints"].items() if "engine" in found}
    for name, engine in engines.items():
        own = result["protocol"]["engine"]
        yield f"{name}: run by {engine['name']} {engine['version']}, the others by {own['name']} {own['version']}"
