"""A command of ours without a Python of its own, which would import torch for seconds before it refuses a file."""

import contextlib
import io
import sys
from collections.abc import Callable
from subprocess import CompletedProcess
from unittest import mock


def run(main: Callable[[], None], program: str, *arguments: object) -> "CompletedProcess[str]":
    """Exit code and what was printed, as `subprocess.run` tells them."""
    words = [program, *map(str, arguments)]
    output, errors = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return CompletedProcess(words, int(str(code)), output.getvalue(), errors.getvalue())


def gemma4q(*arguments: object) -> "CompletedProcess[str]":
    from vllm_gemma4q.cli import main

    return run(main, "gemma4q", *arguments)
