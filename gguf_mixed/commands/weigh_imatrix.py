"""`gguf-mixed weigh-imatrix imatrix.gguf fisher.safetensors -o weighed.gguf`"""

from pathlib import Path
from typing import Annotated

import typer

from gguf_mixed.atomic_file import check_not_read
from gguf_mixed.commands.output import AsJson, show
from gguf_mixed.errors import InputError
from gguf_mixed.fisher import read_fisher
from gguf_mixed.fisher_imatrix import weigh_imatrix
from gguf_mixed.imatrix_gguf import read_imatrix, write_imatrix


def command(
    imatrix: Annotated[Path, typer.Argument(metavar="IMATRIX", help="An imatrix: GGUF, or the older .dat.")],
    fisher: Annotated[Path, typer.Argument(metavar="FISHER", help="What `gguf-mixed fisher` wrote for the model.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The imatrix to write, GGUF.")],
    as_json: AsJson = False,
) -> None:
    """Write an imatrix whose channels weigh by how far they move the model's output, not by their energy alone."""
    check_not_read(output, [imatrix, fisher])
    source = read_imatrix(imatrix)
    weighed, unchanged = weigh_imatrix(source, read_fisher(fisher))
    if len(unchanged) == len(source.entries):
        raise InputError(f"{fisher.name}: of another model: covers no tensor of {imatrix.name}")
    write_imatrix(weighed, output)
    rest = f", {len(unchanged)} as they were ({', '.join(unchanged)})" if unchanged else ""
    weighed_count = len(source.entries) - len(unchanged)
    report = {"output": str(output), "weighed": weighed_count, "unchanged": unchanged}
    show(f"{output}: {weighed_count} entries weighed{rest}", report, as_json)
