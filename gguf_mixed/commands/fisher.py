"""`gguf-mixed fisher MODEL.gguf -o fisher.safetensors --text FILE`"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from gguf_mixed.atomic_file import check_not_read, check_place
from gguf_mixed.commands.output import AsJson, show
from gguf_mixed.error_table import check_source
from gguf_mixed.errors import InputError
from gguf_mixed.fisher import write_fisher
from gguf_mixed.samples import cut_samples, describe_text, is_framed, read_texts
from gguf_mixed.tensors import read_inventory


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="A model, or the first file of a split one.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The Fisher file to write.")],
    text: Annotated[list[Path], typer.Option(metavar="FILE", help="UTF-8 text to measure on. Repeatable.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The Hugging Face checkpoint of the model; else the GGUF is loaded."),
    ] = None,
    passes: Annotated[int, typer.Option(min=1, help="Samples of text, one backward pass each.")] = 16,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a sample.")] = 512,
    raw: Annotated[bool, typer.Option(help="Plain text instead of the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Of the labels' draw.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; all cores where not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how sensitive the model's output is to each weight: a few backward passes (needs its full memory)."""
    inventory = read_inventory(model)
    check_source(inventory, None)
    check_not_read(output, [*(header.path for header in inventory.headers), *text])
    check_place(output)
    try:
        import torch

        from gguf_mixed import backward
    except ImportError as error:
        raise InputError(f"{error.name}: not installed: pip install 'vllm-gemma4q[fisher]'") from error
    if threads:
        torch.set_num_threads(threads)
    content = read_texts(text)
    loaded = backward.load(inventory, checkpoint)
    samples = cut_samples(loaded.tokenizer, content, passes, length, raw)
    details = {
        "text": describe_text(text),
        "framing": "chat template" if is_framed(loaded.tokenizer, raw) else "plain text",
        "length": length,
    }
    found = backward.compute_fisher(loaded, samples, details, seed, sys.stderr.isatty())
    write_fisher(output, found)
    line = f"{output}: {len(found.marginals)} tensors, {found.positions:,} positions, {details['framing']}"
    report = {"output": str(output), "tensors": len(found.marginals), "positions": found.positions, **details}
    show(line, report, as_json)
