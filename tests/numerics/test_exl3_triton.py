"""Runs the EXL3 Triton kernels in Triton's interpreter, in a process of its own: the variable works only on import."""

import os
import subprocess
import sys

import interpreted_exl3
import pytest
import torch
from exl3_weights import FORMATS
from gemma4q_kernels import exl3


def interpreted(*arguments: str) -> list[str]:
    """What it prints: a line for each case that passed."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, interpreted_exl3.__file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_kernels_in_the_interpreter() -> None:
    checks = len(interpreted_exl3.SOME) + 3 + len(interpreted_exl3.ROWS) + len(interpreted_exl3.CHECKS)
    assert len(interpreted()) == checks


@pytest.mark.slow
def test_every_format_and_whole_searches_in_the_interpreter() -> None:
    checks = len(FORMATS) + len(interpreted_exl3.STEPS) + len(interpreted_exl3.SEARCHED)
    assert len(interpreted("--all-formats")) == checks


def test_triton_is_what_gpus_get_and_what_a_cpu_refuses() -> None:
    assert exl3.BACKENDS == ("triton", "blocks", "reference")
    assert exl3.dispatch.AUTO["cuda"] == ("triton", "blocks")
    with pytest.raises(ValueError, match="triton launches on GPUs"):
        exl3.choose("cpu", 1, 128, 128, torch.bfloat16, "triton")
