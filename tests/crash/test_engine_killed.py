"""Measurements by the real vLLM, killed. It takes 20 seconds to start, so this is at a few moments, and not run again:
all that an evaluation leaves is what it prints. At 50 moments, with a stub for vLLM: "evaluate divergence by vLLM".
"""

import os
import random
import signal
import time

import pytest
from crash_cases import EXAMPLES
from crash_runs import SEED, TEMPORARY, Case

from vllm_gemma4q.evaluation.server import READY_TIMEOUT_SECONDS

START_SECONDS = 15.0


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("when", ["at the start", "a little later", "recording"])
def test_a_killed_evaluation_leaves_nothing(light_server, made, when, tmp_path):
    draw = random.Random(f"{SEED} {when}")
    size = ("--text", made / "text.txt", "--context", 64, "--framing", "raw", "--work", ".")
    case = Case(when, "gemma4q", ("evaluate", "divergence", EXAMPLES / "dense", EXAMPLES / "dense", *size))
    run, begun = light_server.start(case, tmp_path), time.monotonic()
    moment = begun + (READY_TIMEOUT_SECONDS if when == "recording" else draw.uniform(0, START_SECONDS))
    while time.monotonic() < moment and not recorded(tmp_path):
        time.sleep(0.01)
    assert bool(recorded(tmp_path)) == (when == "recording")
    os.killpg(run, signal.SIGKILL)
    assert light_server.wait(run).status == -signal.SIGKILL
    light_server.check_nothing_left(tmp_path, f"{when}, after {time.monotonic() - begun:.2f} s")


def recorded(folder):
    return [path for path in folder.glob(f"{TEMPORARY}*/reference") if path.stat().st_size]
