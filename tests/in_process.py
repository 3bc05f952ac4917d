"""A command of ours without a Python of its own, which would import torch for seconds before it refuses a file."""

import contextlib
import io
import sys
from subprocess import CompletedProcess
from unittest import mock


def gemma4q(*arguments: object) -> "CompletedProcess[str]":
    """Exit code and what was printed, as `subprocess.run` tells them."""
    from vllm_gemma4q.cli import main

    words = ["gemma4q", *map(str, arguments)]
    output, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as end:
            return CompletedProcess(words, int(end.code or 0), output.getvalue(), errors.getvalue())
    raise AssertionError("main returned, expected SystemExit")
