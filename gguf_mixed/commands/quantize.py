"""`gguf-mixed quantize MODEL.gguf OUT.gguf --overrides overrides.txt`"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from gemma4q_kernels.ggml.quantize import Quantizers

from gguf_mixed.atomic_file import check_not_read
from gguf_mixed.commands.output import AsJson, show
from gguf_mixed.engine import Engine, find_engine, prepare
from gguf_mixed.imatrix_gguf import read_imatrix
from gguf_mixed.overrides import read_overrides
from gguf_mixed.quantize import Job, partial_path
from gguf_mixed.sidecar import check_imatrix, check_model, read_sidecar
from gguf_mixed.tensors import read_inventory


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="A model, or the first file of a split one.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    overrides: Annotated[Path, typer.Option(metavar="FILE", help="The table that `gguf-mixed plan` wrote.")],
    imatrix: Annotated[Path | None, typer.Option(metavar="FILE", help="The importance matrix, GGUF or .dat.")] = None,
    engine: Annotated[
        Engine, typer.Option(help="Run llama-quantize, or call ggml's library: the same file. auto: what is there.")
    ] = Engine.AUTO,
    llama_cpp: Annotated[Path | None, typer.Option(metavar="DIR", help="Use the llama.cpp in here.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads, all processors unless given.")] = None,
    allow_requantize: Annotated[bool, typer.Option(help="Accept a model that is quantized already.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT.gguf.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command, or what is done, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Quantize with a table, check every tensor's type and the size, and only then name the file OUT.gguf."""
    inventory = read_inventory(model)
    table = read_overrides(overrides)
    content = read_sidecar(overrides, table)
    if content is not None:
        check_model(content, inventory)
        check_imatrix(content, overrides, imatrix)
    job = Job(inventory, table, None if imatrix is None else read_imatrix(imatrix), imatrix)
    found = find_engine(engine, llama_cpp)
    if isinstance(found.used, Quantizers) and found.because:
        print(f"{found.because}; using {found.used.library}", file=sys.stderr)
    writing = prepare(found, job, overrides, output, threads=threads, allow_requantize=allow_requantize)
    report = {
        "model": str(model),
        "output": str(output),
        "dry_run": dry_run,
        "how": writing.description,
        "bytes": job.file_bytes,
        "bpw": job.bpw,
        "tensors": len(job.written),
    }
    if dry_run:
        show(writing.description, report, as_json)
        return
    check_not_read(output, [overrides, imatrix])
    differences = writing.run(_say, overwrite=overwrite, progress=sys.stderr.isatty())
    if differences:
        show("\n".join(differences), report | {"differences": differences}, as_json)
        print(f"{partial_path(output)}: not as planned, {len(differences)} differences", file=sys.stderr)
        raise typer.Exit(1)
    line = f"{output}: {job.file_bytes:,} bytes, {job.bpw:.3f} bpw; all {len(job.written)} tensors as planned"
    show(line, report | {"differences": []}, as_json)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
