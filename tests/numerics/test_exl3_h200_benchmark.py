"""What of `benchmarks/exl3_h200.py` can be tested without its GPU: its goals, its refusal, a run in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_gemma4q.benchmark.shapes import Shape

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import exl3_h200_goals  # noqa: E402

# Everything but the timing of the GPU: weights, checks against the definition, figures, the search.
INTERPRETED = """
import math, torch, exl3_h200
from vllm_gemma4q.benchmark.shapes import Shape
exl3_h200.COPY_BYTES, exl3_h200.MORE_FORMATS = 1 << 10, ()
exl3_h200.copies_beyond_cache = lambda n_bytes, device: 2
torch.manual_seed(0)
shape, lines = Shape(128, 256, "small"), []
figures, raw = exl3_h200.measure([shape], (1, 65), torch.device("cpu"), 0.0, lines.append)
assert len(figures) == 5 and len(lines) == 6 and all(math.isfinite(figure.value) for figure in figures)
assert [sum(figure.met is not None for figure in figures)] == [2]
assert [each["m"] for each in raw["linears"]] == [1, 65] and len(raw["reconstruct"]) == 1
weight, x = exl3_h200.packed(shape, "mcg", 64, torch.device("cpu")), torch.randn(2, 256)
out = exl3_h200.linear(x, [weight], backend="reference")
exl3_h200.check("right", out, x, weight)
try:
    exl3_h200.check("wrong", out * 1.1, x, weight)
except SystemExit as error:
    print(error)
"""


def test_its_host_code_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS)}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrong: got a relative error of 0.1 against float64, expected at most 0.0078")


def test_goals_of_decoding() -> None:
    """gate_up of the 31B at 4 bits is 116 MB: 27 us at 4.3 TB/s, and the goal is 55% of that speed."""
    shape = Shape(43008, 5376, "gate_up")
    ideal = (43008 * 5376 / 2 + 2 * (43008 + 5376)) / 4.3e12
    assert ideal == pytest.approx(26.9e-6, rel=0.01)
    for factor, met in ((1 / 0.56, True), (1 / 0.54, False)):
        share, speed = exl3_h200_goals.linear_goals(shape, 64, 1, ideal * factor, 1.0, 4.3e12)
        assert share.value == pytest.approx(1 / factor) and share.met is met
        assert speed.value == pytest.approx(1 / (ideal * factor)) and speed.met is None
    for width, m in ((48, 1), (64, 9)):
        share, _ = exl3_h200_goals.linear_goals(shape, width, m, 1.0, 1.0, 4.3e12)
        assert share.met is None


def test_goals_of_reconstruction() -> None:
    shape = Shape(43008, 5376, "gate_up")
    for seconds, met in ((1.49, True), (1.51, False)):
        (figure,) = exl3_h200_goals.reconstruct_goals(shape, 64, seconds, 1.0)
        assert figure.met is met
    assert exl3_h200_goals.reconstruct_goals(shape, 96, 1.0, 1.0)[0].met is None


def test_without_a_gpu_it_says_so() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, BENCHMARKS / "exl3_h200.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == "error: exl3_h200: needs an NVIDIA GPU, torch sees none"
