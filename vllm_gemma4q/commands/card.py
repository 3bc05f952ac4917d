"""`gemma4q card DST --result FILE`: a model card of what was made and measured."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.header import read_json
from vllm_gemma4q.checkpoint.run import MANIFEST
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.vram.engines import Request, parse_engine
from vllm_gemma4q.vram.source import open_source
from vllm_gemma4q.vram.table import contexts_of, rows_of

CARD = "README.md"


def command(
    checkpoint: Annotated[Path, typer.Argument(metavar="DST", help="A checkpoint that gemma4q wrote.")],
    result: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="What evaluate or sweep printed with --json. Repeatable.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(metavar="ID", help="Hugging Face id of the original.")] = None,
    author: Annotated[str | None, typer.Option(metavar="NAME", help="Who quantized it.")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="NAME", help="The original's, such as apache-2.0.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading, and name of the repository; DST's name.")] = None,
    context: Annotated[str | None, typer.Option(metavar="2K,4K,..", help="Contexts of the table of memory.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="DST/README.md; - for standard output.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Write a Hugging Face model card from the manifest and result files only. What was not measured is left out."""
    from vllm_gemma4q.calibration.identity import model_identity
    from vllm_gemma4q.card.card import SCHEMES, Card
    from vllm_gemma4q.card.results import read_results

    found = open_checkpoint(checkpoint)
    if not (checkpoint / MANIFEST).is_file():
        raise InputError(f"{checkpoint}: has no {MANIFEST}, expected a checkpoint that gemma4q wrote")
    manifest = read_json(checkpoint / MANIFEST)
    if manifest["identity"]["scheme"] not in SCHEMES:
        raise InputError(f"{MANIFEST}: got scheme {manifest['identity']['scheme']}, expected {', '.join(SCHEMES)}")
    results = read_results(result or [], model_identity(found))
    source = open_source(checkpoint)
    memory = rows_of([source], [parse_engine("vllm")], Request(), contexts_of(context, source.longest))
    name = title or checkpoint.resolve().name
    text = Card(name, manifest, results, memory, base_model, author, licence).markdown()
    if str(output) == "-":
        sys.stdout.write(text)
        return
    path = output or checkpoint / CARD
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"{path}: exists and is another; remove it, or choose another name with --output")
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    print(json.dumps({"card": str(path), "results": len(result or [])}) if as_json else f"Wrote {path}.")
