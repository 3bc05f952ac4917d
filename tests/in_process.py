"""Our commands without a Python of their own, which would import torch for seconds before it refuses a file."""

import contextlib
import io
import sys
from importlib import import_module
from typing import NamedTuple
from unittest import mock

PROGRAMS = {"gemma4q": "vllm_gemma4q.cli", "gguf-mixed": "gguf_mixed.cli"}


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(program: str, *arguments: object) -> Finished:
    """What it did."""
    main = import_module(PROGRAMS[program]).main
    output, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [program, *map(str, arguments)]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as end:
            return Finished(int(end.code or 0), output.getvalue(), errors.getvalue())
    raise AssertionError("main returned, expected SystemExit")


def gemma4q(*arguments: object) -> Finished:
    return run("gemma4q", *arguments)
