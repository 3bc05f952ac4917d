"""Ctrl-C at both commands: one line, exit code 130, no traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    ("command", "blocking", "message"),
    [
        ("gguf-mixed imatrix {folder}/imatrix.dat", "imatrix.dat", "interrupted\n"),
        (
            "gemma4q evaluate gsm8k --url http://127.0.0.1:9 --questions {folder}/questions.jsonl "
            "--shots {folder}/questions.jsonl --results {folder}/results.jsonl",
            "questions.jsonl",
            "interrupted: run the same command again to resume\n",
        ),
    ],
    ids=["gguf-mixed", "gemma4q"],
)
def test_interrupted(tmp_path, command, blocking, message):
    """The command waits for its input at a pipe; the pipe's other end can be opened once it is there."""
    os.mkfifo(tmp_path / blocking)
    program, *arguments = command.format(folder=tmp_path).split()
    process = subprocess.Popen([BIN / program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pipe = None
    while pipe is None and process.poll() is None:
        try:
            pipe = os.open(tmp_path / blocking, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.01)
    assert pipe is not None, process.communicate()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    os.close(pipe)
    assert (process.returncode, output, errors) == (130, "", message)
