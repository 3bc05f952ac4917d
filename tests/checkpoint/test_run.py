"""Interrupted, repeated, concurrent and refused runs: nothing lost, nothing half-written."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from synthetic import small_config, write_checkpoint

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.checkpoint.run import JOURNAL
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.quark_int8 import quantize

SCRIPT = Path(__file__).with_name("killed_run.py")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(source, target, progress=lambda _: None):
    return convert(quantize.plan(open_checkpoint(source), max_shard_bytes=60_000), target, ["test"], progress)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "source", small_config(moe=True), shards=2)


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("unbroken") / "target"
    assert run(source, target)
    return content(target)


def test_killed_again_and_again_and_resumed_is_byte_identical(source, unbroken, tmp_path):
    """Each run dies some blocks further on; every state on the way is one to resume from."""
    target = tmp_path / "target"
    finished = []
    while subprocess.run([sys.executable, SCRIPT, source, target, "37"], check=False).returncode == -signal.SIGKILL:
        assert not (target / "config.json").exists()
        assert (target / JOURNAL).exists()
        finished.append(len(list(target.glob("*.safetensors"))))
    assert len(finished) >= 2
    assert finished == sorted(set(finished))
    assert content(target) == unbroken


def test_repeating_a_finished_run_does_nothing(source, tmp_path):
    assert run(source, tmp_path / "target")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "target").iterdir()}
    assert not run(source, tmp_path / "target")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "target").iterdir()} == before


def test_source_changed_between_runs(tmp_path):
    source = write_checkpoint(tmp_path / "source", small_config())
    target = tmp_path / "target"
    subprocess.run([sys.executable, SCRIPT, source, target, "40"], check=False)
    before = content(target)
    shutil.rmtree(source)
    write_checkpoint(source, small_config(), seed=1)
    with pytest.raises(InputError, match="unfinished run with another source"):
        run(source, target)
    assert content(target) == before


def test_finished_target_of_another_source_is_refused(source, tmp_path):
    run(source, tmp_path / "target")
    other = write_checkpoint(tmp_path / "other", small_config(moe=True), seed=1)
    with pytest.raises(InputError, match="not empty"):
        run(other, tmp_path / "target")


def test_folder_with_other_files_is_left_alone(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty, and not an unfinished run"):
        run(source, tmp_path)
    assert content(tmp_path) == {"notes.txt": b"mine"}


def test_second_run_on_one_target_is_refused(source, tmp_path):
    entered, leave = threading.Event(), threading.Event()

    def wait_inside(_):
        entered.set()
        assert leave.wait(60)

    first = threading.Thread(target=run, args=(source, tmp_path / "target", wait_inside))
    first.start()
    try:
        assert entered.wait(60)
        with pytest.raises(InputError, match="another run is writing here"):
            run(source, tmp_path / "target")
    finally:
        leave.set()
        first.join()
    assert (tmp_path / "target" / "config.json").exists()


def test_source_that_shrinks_under_the_reader(tmp_path):
    source = write_checkpoint(tmp_path / "source", small_config())
    conversion = quantize.plan(open_checkpoint(source))
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(500_000)
    with pytest.raises(InputError, match="model.safetensors: truncated while it was read"):
        convert(conversion, tmp_path / "target", ["test"], lambda _: None)
    assert not (tmp_path / "target").exists()


def test_interrupt_keeps_what_is_finished(source, unbroken, tmp_path):
    names = interrupted(source, tmp_path / "target").keys()
    assert JOURNAL in names
    assert not [name for name in names if name.endswith(".partial")]
    assert run(source, tmp_path / "target")
    assert content(tmp_path / "target") == unbroken


def interrupted(source, target):
    """What a run has finished that somebody ended."""
    calls = []

    def interrupt(n_bytes):
        calls.append(n_bytes)
        if len(calls) == 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, target, interrupt)
    return content(target)


def test_a_disk_that_is_full_again_costs_nothing(source, unbroken, tmp_path, monkeypatch):
    before = interrupted(source, tmp_path / "target")
    assert len(before) > 1
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1))
        with pytest.raises(InputError, match="target: disk has 1 bytes free, output needs "):
            run(source, tmp_path / "target")
        with pytest.raises(InputError, match="disk has 1 bytes free"):
            run(source, tmp_path / "another")
    assert content(tmp_path / "target") == before
    assert not (tmp_path / "another").exists()
    assert run(source, tmp_path / "target")
    assert content(tmp_path / "target") == unbroken


def test_a_source_that_cannot_be_read_for_a_moment(source, unbroken, tmp_path, monkeypatch):
    """As on a network's file system: the message is of the source, and what is finished stays."""
    before = interrupted(source, tmp_path / "target")

    def refuse(*arguments):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse)
        with pytest.raises(InputError, match=r"^model-\S+: cannot be read: Stale file handle$"):
            run(source, tmp_path / "target")
    assert content(tmp_path / "target") == before
    assert run(source, tmp_path / "target")
    assert content(tmp_path / "target") == unbroken


def test_a_target_that_leads_nowhere(source, tmp_path):
    (tmp_path / "target").symlink_to(tmp_path / "absent")
    with pytest.raises(InputError, match="target: cannot be written: File exists"):
        run(source, tmp_path / "target")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("target", ["inside/deeper", ".", ".."])
def test_target_in_or_around_the_source_is_refused(source, target):
    with pytest.raises(InputError, match="must lie outside the source"):
        run(source, source / target)


def test_journal_of_a_stranger_cannot_reach_outside(source, tmp_path):
    """A journal is a file like any other: names in it that leave the folder are not followed."""
    target, victim = tmp_path / "target", tmp_path / "victim.safetensors"
    victim.write_bytes(b"keep")
    subprocess.run([sys.executable, SCRIPT, source, target, "1"], check=False)
    line = {"name": "../victim.safetensors", "n_bytes": 4, "sha256": "0" * 64}
    with (target / JOURNAL).open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert run(source, target)
    assert victim.read_bytes() == b"keep"
