"""Runs the INT8 Triton kernels in Triton's interpreter, in a process of its own: the variable works only on import."""

import os
import subprocess
import sys
from pathlib import Path

import interpreted_int8


def test_kernels_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(interpreted_int8.__file__)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(interpreted_int8.SHAPES) + len(interpreted_int8.SPLITS) + 9
