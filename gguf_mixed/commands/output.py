"""What commands print on stdout: a line for people, or one document for machines."""

import json
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def show(line: str, content: dict[str, Any], as_json: bool) -> None:
    """One of both."""
    print(json.dumps(content) if as_json else line)
