"""`gemma4q prune` with a refit, killed in the refit and while writing, and started again: the same checkpoint."""

import os
import subprocess
import sys
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
    """All but the manifest, which holds the command, and so the folder. tests/crash compares that too."""
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
