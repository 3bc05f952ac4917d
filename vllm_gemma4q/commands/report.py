"""`gemma4q report CKPT|MODEL.gguf -o report.html`"""

import json
from pathlib import Path
from typing import Annotated

import typer

from gguf_mixed.atomic_file import write_file
from vllm_gemma4q.errors import InputError


def command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT|MODEL.gguf", help="Checkpoint folder, or a .gguf file.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page; replaced where it exists.")],
    base: Annotated[
        Path | None,
        typer.Option(metavar="BF16", help="The unquantized model, in the same form: measures errors, reading both."),
    ] = None,
    result: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="What evaluate or sweep printed with --json. Repeatable.")
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(metavar="ENGINE", help="As of doctor. Repeatable.  [default: those that might load it]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the page's facts as one JSON document.")] = False,
) -> None:
    """One HTML page of a checkpoint: bits, errors and bytes by layer and module, findings, memory, quality."""
    from vllm_gemma4q.report import facts
    from vllm_gemma4q.report.render import render

    if output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--output {output}: expected a name that ends in .html")
    found = facts.collect(checkpoint, base, result or [], engine)
    text = render(found)
    write_file(output, text)
    if as_json:
        print(json.dumps({"report": str(output), **facts.as_json(found)}))
    else:
        print(f"Wrote {output} ({len(text.encode()) / 1e6:.2f} MB).")
