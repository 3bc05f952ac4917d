"""`gguf-mixed imatrix FILE`"""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from gguf_mixed.atomic_file import check_not_read
from gguf_mixed.commands.output import AsJson
from gguf_mixed.errors import one_line
from gguf_mixed.imatrix import Imatrix, ImatrixEntry
from gguf_mixed.imatrix_gguf import read_imatrix, write_imatrix
from gguf_mixed.roles import ranges
from gguf_mixed.statistics_file import is_statistics, read_as_imatrix


def command(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="An imatrix, GGUF or the older .dat, or what gemma4q calibrate wrote."),
    ],
    write: Annotated[
        Path | None, typer.Option(metavar="OUT.gguf", help="Write it as GGUF, as llama-quantize reads it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what an imatrix was computed on, and which experts it never saw; make one of calibration statistics."""
    imatrix = read_as_imatrix(file) if is_statistics(file) else read_imatrix(file)
    if write is not None:
        check_not_read(write, [file])
        write_imatrix(imatrix, write)
    if as_json:
        print(json.dumps(_report(file, imatrix)))
        return
    print(f"{file}: {len(imatrix.entries)} entries, {imatrix.chunk_count} chunks of {_chunk_size(imatrix)}")
    for dataset in imatrix.datasets:
        print(one_line(f"computed on: {dataset}"))
    experts = {name: entry for name, entry in imatrix.entries.items() if len(entry.counts) > 1}
    if experts:
        Console().print(_expert_table(experts))
    missing = [name for name, entry in imatrix.entries.items() if len(entry.counts) == 1 and entry.never_used]
    if missing:
        print(one_line(f"without any data: {', '.join(missing)}"))


def _chunk_size(imatrix: Imatrix) -> str:
    if imatrix.chunk_size is None:
        return "unknown size (legacy file: counts are in chunks, and those of single experts are lost)"
    return f"{imatrix.chunk_size} tokens"


def _report(file: Path, imatrix: Imatrix) -> dict[str, Any]:
    return {
        "file": str(file),
        "legacy": imatrix.chunk_size is None,
        "datasets": list(imatrix.datasets),
        "chunk_count": imatrix.chunk_count,
        "chunk_size": imatrix.chunk_size,
        "entries": {
            name: {
                "values": entry.sums.size,
                "counts": entry.counts.tolist(),
                "never_used": list(entry.never_used),
            }
            for name, entry in imatrix.entries.items()
        },
    }


def _expert_table(experts: dict[str, ImatrixEntry]) -> Table:
    table = Table(title="tokens seen by each expert")
    table.add_column("tensor")
    for heading in ("experts", "least", "median", "most"):
        table.add_column(heading, justify="right")
    table.add_column("never visited")
    for name, entry in experts.items():
        table.add_row(
            one_line(name),
            str(len(entry.counts)),
            str(int(entry.counts.min())),
            f"{np.median(entry.counts):g}",
            str(int(entry.counts.max())),
            ranges(entry.never_used),
        )
    return table
