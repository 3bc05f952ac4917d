"""Calibration by processes: the bytes of one, whoever is killed on the way and whoever goes on."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calibrate_runs import IN_MEMORY, KINDS, SMALL, SPILLED, run
from safetensors.torch import load_file, save_file
from test_workers import is_alive, wait_until

from gguf_mixed.tasks.processes import THREADS, Processes
from vllm_gemma4q.calibration.texts import load_samples
from vllm_gemma4q.checkpoint.run import JOURNAL

SCRIPT = Path(__file__).with_name("calibrate_runs.py")
GEMMA4Q = Path(sys.executable).with_name("gemma4q")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Of this process and of its workers."""
    before, threads = os.environ.get(THREADS), torch.get_num_threads()
    os.environ[THREADS] = "1"
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.environ.pop(THREADS) if before is None else os.environ.update({THREADS: before})


@pytest.fixture(scope="module")
def alone(tmp_path_factory, one_thread):
    """What one process writes, by kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        run(kind, folder / "statistics", None)
    return {kind: (folder / "statistics").read_bytes() for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def two():
    """Two workers for tests that kill none: they load transformers once."""
    with Processes(2) as workers:
        yield workers


class Stop(Exception):
    """What no run expects."""


def stop_at(work, name, workers, limit=IN_MEMORY):
    """A run of the mixture that is interrupted when a file of that name is in the work folder."""

    def progress(_):
        if list(work.glob(name)):
            raise Stop

    with pytest.raises(Stop):
        run("moe", work.with_suffix(""), workers, progress, limit)
    assert not list(work.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_by_two(alone, two, tmp_path, kind):
    done = []
    steps = run(kind, tmp_path / "statistics", two, done.append)
    assert (tmp_path / "statistics").read_bytes() == alone[kind]
    assert sum(done) == steps


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 3])
def test_same_bytes_by_threads_and_from_files(alone, tmp_path, threads):
    torch.set_num_threads(threads)
    run("moe", tmp_path / "statistics", None, limit=SPILLED)
    torch.set_num_threads(1)
    assert (tmp_path / "statistics").read_bytes() == alone["moe"]


@pytest.mark.slow
def test_same_bytes_by_three_and_one_is_killed_half_way(alone, tmp_path):
    """Its part is done by another, and nothing of it stays."""
    killed, work = [], tmp_path / "statistics.work"
    with Processes(3) as workers:

        def progress(_):
            if list(work.glob("layer-*1-samples-*.safetensors")) and workers._busy and not killed:
                killed.append(next(iter(workers._busy.values())).process.pid)
                os.kill(killed[0], signal.SIGKILL)

        run("moe", tmp_path / "statistics", workers, progress)
        assert killed and killed[0] not in [worker.process.pid for worker in workers._idle]
    assert (tmp_path / "statistics").read_bytes() == alone["moe"]


@pytest.mark.slow
def test_the_caller_is_killed_half_way(alone, tmp_path):
    """Workers end with it; one process goes on where they stopped."""
    target, work = tmp_path / "statistics", tmp_path / "statistics.work"
    caller = subprocess.Popen([sys.executable, SCRIPT, "moe", target, "2"], stdout=subprocess.PIPE, text=True)
    wait_until(lambda: any(work.glob("layer-*1-samples-*.safetensors")), seconds=300)
    caller.kill()
    workers = [int(line) for line in caller.communicate()[0].split()]
    assert len(workers) == 2
    wait_until(lambda: not any(map(is_alive, workers)), seconds=20)
    assert (work / JOURNAL).exists() and not target.exists()
    done = []
    steps = run("moe", target, None, done.append)
    assert target.read_bytes() == alone["moe"]
    assert sum(done) == steps and done[0] > 0, "layers that were finished are not done again"


@pytest.mark.slow
def test_runs_are_taken_over_by_each_other(alone, two, tmp_path):
    """By workers from one process, in memory and in files, and the other way round."""
    target, work = tmp_path / "statistics", tmp_path / "statistics.work"
    stop_at(work, "layer-00000.safetensors", None)
    stop_at(work, "layer-00001-samples-*.safetensors", two)
    finished = {path: path.stat().st_mtime_ns for path in work.glob("layer-00001-samples-*.safetensors")}
    stop_at(work, "layer-00001.safetensors", None, SPILLED)
    assert not any(path.exists() for path in finished), "of a layer that is whole"
    run("moe", target, two)
    assert target.read_bytes() == alone["moe"]


@pytest.mark.slow
def test_a_bad_input_of_one_part(two, tmp_path):
    """A token whose embedding is not finite: one line that names the module, exit code 2, and nothing stays."""
    model, text = shutil.copytree(SMALL / "moe", tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("\n".join(f"The {number} sheep of the valley went home. " * 9 for number in range(60)))
    ids = load_samples(model, [text], 4, 60).ids
    token = next(token for token in ids[2] if not any(token in sample for sample in (*ids[:2], ids[3])))
    (shard,) = [
        path for path in model.glob("*.safetensors") if "model.language_model.embed_tokens.weight" in load_file(path)
    ]
    weights = load_file(shard)
    weights["model.language_model.embed_tokens.weight"][token] = float("inf")
    save_file(weights, shard, {"format": "pt"})
    command = [GEMMA4Q, "calibrate", model, tmp_path / "statistics", "--text", text, "--samples", "4"]
    result = subprocess.run(
        [*command, "--max-length", "60", "--workers", "2"], capture_output=True, text=True, check=False
    )
    module = "model.language_model.layers.0.self_attn.q_proj"
    assert result.stderr == f"error: module {module}: its input is not finite; try --dtype float32\n"
    assert (result.returncode, result.stdout) == (2, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]
