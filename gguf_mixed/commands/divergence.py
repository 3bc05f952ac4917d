"""`gguf-mixed divergence REFERENCE.gguf MODEL.gguf.. --text FILE`"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from tqdm import tqdm

from gguf_mixed.base_file import Comparison, ensure_base
from gguf_mixed.commands import comparison_options as options
from gguf_mixed.commands.output import AsJson
from gguf_mixed.identity import model_sha256
from gguf_mixed.llama_cpp import find_tool
from gguf_mixed.perplexity import Base, Divergence, check_vocabulary, divergence, vocabulary_of
from gguf_mixed.tensors import Inventory, read_inventory


def command(
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE.gguf", help="What the others are compared with.")],
    models: Annotated[list[Path], typer.Argument(metavar="MODEL.gguf..", help="Models with its vocabulary.")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text that nothing was calibrated on.")],
    chunks: options.Chunks = options.DEFAULT_CHUNKS,
    context: options.Context = options.CONTEXT,
    base: options.BaseFile = None,
    llama_cpp: options.LlamaCpp = None,
    threads: options.Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure how far quantized models are from the one they were made of, with the real llama-perplexity."""
    inventories = [read_inventory(model) for model in models]
    vocabulary = vocabulary_of(reference)
    for model in models:  # all of them before the first, which may take hours
        check_vocabulary(reference, vocabulary, model)
    tool = find_tool("llama-perplexity", llama_cpp)
    comparison = Comparison(tool, reference, text, chunks, context, threads)
    with options.base_path(base) as path:
        written = ensure_base(comparison, path, lambda line: print(line, file=sys.stderr))
        found = []
        for model in (progress := tqdm(models, unit="model", disable=not sys.stderr.isatty())):
            found.append(divergence(tool, model, path, threads=threads))
            if len(models) > 1:  # so that it is known should a later one fail
                progress.write(_line(model, found[-1]), file=sys.stderr)
    if as_json:
        print(json.dumps(_report(comparison, written, inventories, found)))
        return
    table = Table(
        title=f"from {reference.name}, {written.positions:,} positions of {text.name}",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", overflow="fold", min_width=12)
    for heading in ("size", "bpw", *options.HEADINGS):
        table.add_column(heading, justify="right", no_wrap=True)
    for inventory, each in zip(inventories, found, strict=True):
        size, bpw = decimal(inventory.file_bytes), f"{_bpw(inventory):.3f}"
        table.add_row(inventory.path.name, size, bpw, *options.cells(each))
    Console().print(table)


def _line(model: Path, found: Divergence) -> str:
    told = zip(options.HEADINGS, options.cells(found), strict=True)
    return f"{model.name}: {'; '.join(f'{heading} {cell}' for heading, cell in told)}"


def _report(
    comparison: Comparison, base: Base, inventories: list[Inventory], found: list[Divergence]
) -> dict[str, Any]:
    return {
        **comparison.record,
        "positions": base.positions,
        "models": [
            {
                "model": str(inventory.path),
                "sha256": model_sha256(inventory),
                "file_bytes": inventory.file_bytes,
                "bpw": _bpw(inventory),
                "divergence": asdict(each),
            }
            for inventory, each in zip(inventories, found, strict=True)
        ],
    }


def _bpw(inventory: Inventory) -> float:
    return 8 * inventory.tensor_bytes / inventory.n_elements
