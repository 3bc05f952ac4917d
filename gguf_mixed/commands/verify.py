"""`gguf-mixed verify OUT.gguf overrides.txt`"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from gguf_mixed.commands.output import AsJson, show
from gguf_mixed.errors import InputError
from gguf_mixed.overrides import read_overrides
from gguf_mixed.sidecar import planned_types, read_sidecar, sidecar_path
from gguf_mixed.verify import find_differences


def command(
    written: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="What llama-quantize wrote.")],
    overrides: Annotated[Path, typer.Argument(metavar="FILE", help="The table, with its .json beside it.")],
    as_json: AsJson = False,
) -> None:
    """Compare every tensor's type and the file's size with the plan: exit code 0 if equal, 1 if not, 2 on bad input."""
    table = read_overrides(overrides)
    content = read_sidecar(overrides, table)
    if content is None:
        raise InputError(f"{sidecar_path(overrides).name}: missing: it holds the plan for the tensors that are kept")
    types = planned_types(content)
    differences = find_differences(written, types, content["file_type"])
    report = {"model": str(written), "tensors": len(types), "differences": differences}
    show("\n".join(differences) or f"{written}: all {len(types)} tensors and the size are as planned", report, as_json)
    if differences:
        print(f"{written}: not as planned, {len(differences)} differences", file=sys.stderr)
        raise typer.Exit(1)
