"""`gemma4q evaluate perplexity|divergence|gsm8k`: what a checkpoint is worth on the engine that serves it."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_gemma4q.commands import evaluate_gsm8k
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.windows import Framing

if TYPE_CHECKING:  # transformers, which only these commands need
    from vllm_gemma4q.evaluation.measure import Protocol

app = typer.Typer(help="Measure checkpoints through vLLM.", no_args_is_help=True)
app.command("gsm8k")(evaluate_gsm8k.command)

_WIDTH = 140

Text = Annotated[list[Path], typer.Option(metavar="FILE", help="UTF-8 text to predict. Repeatable.")]
Framings = Annotated[
    list[Framing] | None,
    typer.Option(help="raw: llama-perplexity's protocol; chat: half of each window as the model's answer. Both."),
]
Context = Annotated[int, typer.Option(min=3, help="Tokens of a window.")]
Chunks = Annotated[int | None, typer.Option(min=1, help="Windows of each framing; all by default.")]
Ranks = Annotated[int, typer.Option("--tensor-parallel-size", "-tp", min=1, help="As for vllm serve.")]
EngineDtype = Annotated[str, typer.Option(metavar="DTYPE", help="As for vllm serve.")]
Log = Annotated[Path | None, typer.Option(metavar="FILE", help="Keep what the engine prints.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.command("perplexity")
def perplexity_command(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CKPT..", help="Checkpoint folders.")],
    text: Text,
    framing: Framings = None,
    context: Context = 512,
    chunks: Chunks = None,
    ranks: Ranks = 1,
    dtype: EngineDtype = "auto",
    log: Log = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity on a text, each checkpoint as vLLM serves it."""
    protocol = load(checkpoints[0], text, framing, context, chunks, dtype, ranks)
    with engine_log(log) as output:
        found = {str(path): {**_identity(path), **protocol.run(path, output).to_json()} for path in checkpoints}
    _show({"protocol": protocol.to_json(), "checkpoints": found}, as_json)


@app.command("divergence")
def divergence_command(
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE", help="The unquantized checkpoint.")],
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CKPT..", help="Checkpoint folders.")],
    text: Text,
    framing: Framings = None,
    context: Context = 512,
    chunks: Chunks = None,
    ranks: Ranks = 1,
    dtype: EngineDtype = "auto",
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where two files of distributions fit; a temporary folder.")
    ] = None,
    log: Log = None,
    as_json: AsJson = False,
) -> None:
    """Kullback-Leibler divergence from a reference over the whole vocabulary, and perplexity."""
    protocol = load(reference, text, framing, context, chunks, dtype, ranks)
    with engine_log(log) as output, tempfile.TemporaryDirectory(dir=work) as folder:
        base = protocol.run(reference, output, Path(folder, "reference"))
        found = {str(reference): {**_identity(reference), **base.to_json()}}
        for path in checkpoints:
            other = protocol.run(path, output, Path(folder, "other"))
            found[str(path)] = {**_identity(path), **other.to_json(protocol.compare(base, other))}
    _show({"protocol": protocol.to_json(), "reference": str(reference), "checkpoints": found}, as_json)


def console_width() -> int | None:
    """Of tables: the terminal's, and enough for all columns in a pipe."""
    return None if sys.stdout.isatty() else _WIDTH


@contextmanager
def engine_log(given: Path | None) -> Iterator[Path]:
    """Where the engine prints to: a file of the user's, or one that stays only after a failure that names it."""
    path = given or Path(tempfile.gettempdir(), f"gemma4q-engine-{os.getpid()}.log")
    path.write_bytes(b"")
    yield path
    if given is None:
        path.unlink()


def load(
    checkpoint: Path,
    text: list[Path],
    framings: list[Framing] | None,
    context: int,
    chunks: int | None,
    dtype: str,
    ranks: int,
) -> "Protocol":
    """What the options ask for. Raises InputError: see `load_protocol`; transformers is not installed."""
    try:
        from vllm_gemma4q.evaluation.measure import load_protocol
    except ImportError as error:
        raise InputError(f"{error.name}: not installed: pip install 'vllm-gemma4q[evaluate]'") from error
    return load_protocol(checkpoint, text, framings or list(Framing), context, chunks, dtype, ranks)


def _identity(path: Path) -> dict[str, Any]:
    """Which model figures are of, whatever its folder is called."""
    from vllm_gemma4q.calibration.identity import model_identity
    from vllm_gemma4q.checkpoint import open_checkpoint

    return {"model": model_identity(open_checkpoint(path))}


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    table = Table("checkpoint", "text", "perplexity", "KLD mean", "median", "p99", "p99.9", "same top", "positions")
    for name, found in result["checkpoints"].items():
        for framing, ppl in found["perplexity"].items():
            table.add_row(
                name,
                framing,
                f"{ppl['value']:.4f} ± {ppl['error']:.4f}",
                *_divergence(found, framing),
                f"{ppl['positions']:,}",
            )
    Console(width=console_width()).print(table)


def _divergence(found: dict[str, Any], framing: str) -> list[str]:
    if "divergence" not in found:
        return [""] * 5
    kld = found["divergence"][framing]
    figures = [
        f"{kld['mean_kld']:.5f} ± {kld['error']:.5f}",
        *(f"{kld[key]:.5f}" for key in ("median_kld", "p99_kld", "p999_kld")),
    ]
    return [*figures, f"{kld['same_top']:.2%}"]
