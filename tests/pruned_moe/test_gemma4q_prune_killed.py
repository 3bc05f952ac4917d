"""`gemma4q prune` with a refit, killed in the refit and while writing, and started again: the same checkpoint."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prune_commands import content, gemma4q
from prune_files import EXAMPLE

from vllm_gemma4q.checkpoint.run import MANIFEST

SCRIPT = Path(__file__).with_name("killed_prune.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SAMPLES = 6


def arguments(target, statistics, text):
    options = ["--keep", 12, "--statistics", statistics, "--text", text, "--samples", SAMPLES, "--max-length", 96]
    return list(map(str, ["prune", EXAMPLE, target, *options, "--max-shard-size", "1MB"]))


def run_killed(kill_at, command):
    line = [sys.executable, SCRIPT, ",".join(map(str, kill_at)), *command]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def written(folder):
    """All but the manifest, which states times of the work folder's files."""
    found = content(folder)
    del found[MANIFEST]
    return found


@pytest.fixture(scope="module")
def whole(statistics_file, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    gemma4q(*arguments(folder / "target", statistics_file, text))
    return written(folder / "target")


def test_killed_again_and_again(statistics_file, text, whole, tmp_path):
    # A run reports once what was done before, then each sample of each pass, then blocks written. Killed in layer 1; in
    # layer 2, going on with layer 1; while writing, going on with layer 2.
    kill_at = [1 + 3 * SAMPLES + 4, 1 + 3 * SAMPLES + 8, 1 + 3 * SAMPLES + 20]
    run_killed(kill_at, arguments(tmp_path / "target", statistics_file, text))
    assert written(tmp_path / "target") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.slow
def test_killed_at_random_moments(statistics_file, text, whole, tmp_path):
    """From outside, three times each, whatever it does then."""
    generator, started = random.Random(0), time.perf_counter()
    command = [Path(sys.executable).with_name("gemma4q"), *arguments(tmp_path / "timed", statistics_file, text)]
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    duration = time.perf_counter() - started
    for attempt in range(2):
        command = arguments(tmp_path / str(attempt) / "target", statistics_file, text)
        line = [Path(sys.executable).with_name("gemma4q"), *command]
        for _ in range(3):
            process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
            time.sleep(duration * generator.uniform(0.5, 1.0))
            process.kill()
            process.wait()
        subprocess.run(line, check=True, capture_output=True, env=ENVIRONMENT)
        assert written(tmp_path / str(attempt) / "target") == whole
