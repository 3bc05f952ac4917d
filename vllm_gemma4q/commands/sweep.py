"""`gemma4q sweep SRC FOLDER --bits 3.5 --bits 4 .. --statistics STATS --text FILE`"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from gguf_mixed.commands.output import AsJson
from gguf_mixed.sweep_plot import require_matplotlib
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.commands.evaluate import (
    Chunks,
    Context,
    EngineDtype,
    Framings,
    Ranks,
    Text,
    load,
)
from vllm_gemma4q.commands.evaluate_report import console_width
from vllm_gemma4q.commands.model import Device
from vllm_gemma4q.commands.progress import byte_bar
from vllm_gemma4q.commands.quantize import Codebook, require_hessians
from vllm_gemma4q.evaluation.engines.settings import Settings
from vllm_gemma4q.exl3.quantize import Options

_BITS = (3.0, 3.5, 4.0, 5.0, 6.0, 8.0)


def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="BF16 Gemma 4 checkpoint folder.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Gets checkpoints, results.json and sweep.png.")],
    text: Text,
    bits: Annotated[
        list[float] | None,
        typer.Option(help="Bits a weight in all layers. Repeatable.", show_default="3, 3.5, 4, 5, 6, 8"),
    ] = None,
    head_bits: Annotated[int, typer.Option(help="Bits a weight of the output layer; 16: leave it.")] = 6,
    codebook: Annotated[Codebook, typer.Option(help="What trellis states stand for.")] = Codebook.MCG,
    statistics: Annotated[
        Path | None, typer.Option(metavar="STATS", help="What gemma4q calibrate --hessians wrote for SRC.")
    ] = None,
    no_hessian: Annotated[
        bool, typer.Option("--no-hessian", help="Without --statistics: round every weight for itself.")
    ] = False,
    device: Annotated[Device, typer.Option(help="Where to quantize.")] = Device.CPU,
    framing: Framings = None,
    context: Context = 512,
    chunks: Chunks = None,
    ranks: Ranks = 1,
    dtype: EngineDtype = "auto",
    as_json: AsJson = False,
) -> None:
    """EXL3 at several rates: quantize, serve and measure each beside the original. Run it again to resume."""
    require_matplotlib()
    require_hessians(statistics, no_hessian)
    checkpoint = open_checkpoint(source)
    points = [Options(rate, head_bits, codebook.value, device.value) for rate in bits or _BITS]
    protocol = load([source], text, framing, context, chunks, Settings(dtype=dtype, tensor_parallel_size=ranks))
    from vllm_gemma4q.exl3.sweep import PLOT, Sweep
    from vllm_gemma4q.exl3.sweep_plot import plot

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    sweep = Sweep(checkpoint, folder, protocol, statistics, lambda plan: byte_bar(plan.source_bytes, plan.scheme), say)
    results = sweep.run(points, ["gemma4q", *sys.argv[1:]])
    plot(results, folder / PLOT)
    if as_json:
        print(json.dumps(results))
        return
    Console(width=console_width()).print(_table(results))
    print(f"Plot: {folder / PLOT}")


def _table(results: dict[str, Any]) -> Table:
    """A row for each point and framing, the original's first."""
    table = Table("checkpoint")
    for column in ("bits/weight", "size", "text", "perplexity", "mean KLD", "p99", "same top"):
        table.add_column(column, justify="right")
    for framing in results["protocol"]["windows"]:
        table.add_row("original", "", "", framing, f"{results['reference']['perplexity'][framing]['value']:.4f}")
        for name, found in results["points"].items():
            kld = found["divergence"][framing]
            table.add_row(
                name,
                f"{found['bpw']:.3f}",
                decimal(found["bytes"]),
                framing,
                f"{found['perplexity'][framing]['value']:.4f}",
                f"{kld['mean_kld']:.5f} ± {kld['error']:.5f}",
                f"{kld['p99_kld']:.5f}",
                f"{kld['same_top']:.2%}",
            )
    return table
