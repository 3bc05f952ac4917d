"""`gguf-mixed compute-imatrix MODEL.gguf -o imatrix.gguf --text FILE`"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from gguf_mixed.commands import comparison_options as options
from gguf_mixed.commands.output import AsJson, show
from gguf_mixed.imatrix_compute import DEFAULT_CONTEXT, MOST_CHUNKS, compute_imatrix
from gguf_mixed.llama_cpp import find_tool


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="A model, or the first file of a split one.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The imatrix to write, GGUF.")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text to compute it on.")],
    chunks: Annotated[
        int | None,
        typer.Option(min=1, help="Parts of the text, from its start.", show_default=f"all, at most {MOST_CHUNKS}"),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a part.")] = DEFAULT_CONTEXT,
    process_output: Annotated[
        bool, typer.Option("--process-output/--no-output", help="For the output tensor too, or tied embeddings.")
    ] = True,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read <|turn> and the like as control tokens.")
    ] = False,
    llama_cpp: options.LlamaCpp = None,
    threads: options.Threads = None,
    as_json: AsJson = False,
) -> None:
    """Compute an importance matrix with the real llama-imatrix, and check it against the model."""
    found = compute_imatrix(
        find_tool("llama-imatrix", llama_cpp),
        model,
        text,
        output,
        chunks=chunks,
        context=context,
        threads=threads,
        process_output=process_output,
        parse_special=parse_special,
        log=(lambda line: print(line, file=sys.stderr)) if sys.stderr.isatty() else (lambda line: None),
    )
    line = f"{output}: {len(found.entries)} entries, {found.chunk_count} chunks of {found.chunk_size} tokens"
    report = {"output": str(output), "entries": len(found.entries), "chunks": found.chunk_count}
    show(line, report | {"tokens_a_chunk": found.chunk_size}, as_json)
