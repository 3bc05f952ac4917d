"""`--workers` and `--ray` of the commands that have them."""

import re
from collections.abc import Sequence
from typing import Annotated

import typer

from gguf_mixed.tasks.on_ray import AUTO, LOCAL

_RAY = "--ray"
_ADDRESS = re.compile(rf"{AUTO}|{LOCAL}|[^/\s]+:\d+|\w+://.*")

Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Processes on this machine, each with its share of the cores and the memory of a whole run; "
        "with --ray, on each machine.",
        show_default="1",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        _RAY,
        metavar="[ADDRESS]",
        help=f"Use a Ray cluster: HOST:PORT, or {AUTO} (as without ADDRESS): this machine's, or one just for this run. "
        "Its machines see all files under the same paths.",
    ),
]


def with_address(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command, with an address behind every `--ray` that has none: typer knows no optional values."""
    result = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        result.append(argument)
        if argument == _RAY and not _ADDRESS.fullmatch(following):
            result.append(AUTO)
    return result
