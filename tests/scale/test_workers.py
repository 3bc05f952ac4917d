"""Processes of one machine write what one process writes, whoever is killed on the way."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scale_tasks
from safetensors.torch import load_file, save_file
from scale_runs import CONVERSIONS, content, processes_of, run, write_sources

from gguf_mixed.errors import InputError
from gguf_mixed.tasks import TaskLost, Threads
from gguf_mixed.tasks.base import ATTEMPTS
from gguf_mixed.tasks.processes import Processes
from vllm_gemma4q.checkpoint.run import JOURNAL

SCRIPT = Path(__file__).with_name("scale_runs.py")
GEMMA4Q = Path(sys.executable).with_name("gemma4q")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    write_sources(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """What one process writes, by conversion."""
    target = tmp_path_factory.mktemp("alone")
    for name in CONVERSIONS:
        run(name, folder, target / name, None)
    return {name: content(target / name) for name in CONVERSIONS}


@pytest.fixture(scope="module")
def two():
    """Two workers for tests that kill none: they load torch once."""
    with Processes(2) as workers:
        yield workers


def is_alive(pid: int) -> bool:
    """And no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_results_errors_and_progress(two):
    """Of plain tasks: every result once, with its place; progress adds up; an error is that of the task."""
    for workers in (two, Threads(2)):
        done = []
        assert sorted(workers.run(scale_tasks.square, range(9), done.append)) == [(n, n * n) for n in range(9)]
        assert sum(done) == sum(range(9))
        with pytest.raises(InputError) as raised:
            list(workers.run(scale_tasks.square_but_three, range(9), done.append))
        assert str(raised.value) == "task 3: got three, expected another"
        assert sorted(workers.run(scale_tasks.square, range(3), done.append)) == [(n, n * n) for n in range(3)]


def test_an_error_that_cannot_travel_arrives_as_text(two):
    with pytest.raises(RuntimeError, match="Stubborn: got no pickle"):
        list(two.run(scale_tasks.stubborn, [1], lambda _: None))


def test_a_task_that_kills_workers_is_given_up_by_name():
    message = f"^5: {ATTEMPTS} workers died over it, the last by SIGKILL$"
    with Processes(2) as workers, pytest.raises(TaskLost, match=message):
        list(workers.run(scale_tasks.deadly_five, range(7), lambda _: None))


def test_tasks_are_taken_as_there_are_workers_for_them(two):
    taken = []

    def tasks():
        for number in range(20):
            taken.append(number)
            yield number

    with contextlib.closing(two.run(scale_tasks.square, tasks(), lambda _: None)) as results:
        next(results)
    assert len(taken) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERSIONS)
def test_same_bytes(folder, alone, two, tmp_path, name):
    done = []
    conversion = run(name, folder, tmp_path / "target", two, done.append)
    assert content(tmp_path / "target") == alone[name]
    assert sum(done) == conversion.source_bytes


@pytest.mark.slow
def test_same_bytes_by_three_and_one_is_killed_half_way(folder, alone, tmp_path):
    """Its shard is written by another, and nothing of it stays."""
    killed = []

    with Processes(3) as workers:

        def progress(_):
            if list((tmp_path / "target").glob("*.safetensors")) and not killed:
                killed.append(next(iter(workers._busy.values())).process.pid)
                os.kill(killed[0], signal.SIGKILL)

        run("quark-int8", folder, tmp_path / "target", workers, progress)
        assert killed and killed[0] not in processes_of(workers)
    assert content(tmp_path / "target") == alone["quark-int8"]


@pytest.mark.slow
def test_the_caller_is_killed_half_way(folder, alone, tmp_path):
    """Workers end with it; one process goes on where they stopped."""
    target = tmp_path / "target"
    caller = subprocess.Popen(
        [sys.executable, SCRIPT, "quark-int8", folder, target, "2"], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    wait_until(lambda: any(target.glob("*.safetensors")))
    caller.kill()
    workers = [int(line) for line in caller.communicate()[0].split()]
    assert len(workers) == 2
    wait_until(lambda: not any(map(is_alive, workers)), seconds=20)
    assert (target / JOURNAL).exists() and not (target / "config.json").exists()
    run("quark-int8", folder, target, None)
    assert content(target) == alone["quark-int8"]


@pytest.mark.slow
def test_interrupted_by_the_terminal(folder, tmp_path):
    """Ctrl-C, which a terminal sends to the whole group: one line, workers gone, nothing half-written."""
    command = [GEMMA4Q, "quantize", "dense", tmp_path / "target", "--workers", "2", "--scheme", "exl3", "--bits", "2"]
    process = subprocess.Popen(
        [*command, "--statistics", "hessians"], cwd=folder, stdout=-1, stderr=-1, text=True, start_new_session=True
    )
    wait_until(lambda: any((tmp_path / "target").glob("*.safetensors")))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert errors == "interrupted: run the same command again to resume\n"
    assert len(children) == 2 and not any(is_alive(int(pid)) for pid in children)
    assert not list((tmp_path / "target").glob("*.partial"))


@pytest.mark.slow
def test_bad_weights_in_a_worker_are_one_line_and_nothing_stays(folder, two, tmp_path):
    broken = tmp_path / "moe"
    broken.mkdir()
    for path in (folder / "moe").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    last = sorted(broken.glob("*.safetensors"))[-1]
    tensors = load_file(last)
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    tensors[name][3, 5] = float("nan")
    save_file(tensors, last)
    with pytest.raises(InputError, match=f"^tensor {name}, from row 0: "):
        run("quark-int8", tmp_path, tmp_path / "target", two)
    assert not (tmp_path / "target").exists()


def test_no_workers_is_a_usage_error(folder, tmp_path):
    command = [GEMMA4Q, "quantize", folder / "moe", tmp_path / "target", "--scheme", "quark-int8", "--workers", "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "--workers" in result.stderr
    assert not (tmp_path / "target").exists()
