"""A killed calibration goes on where it was and ends with the same bytes; activations may lie in memory or on disk."""

import errno
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibration_runs import IN_MEMORY, SAMPLES, SPILLED, calibration

from vllm_gemma4q.calibration import weights
from vllm_gemma4q.calibration.activations import Activations, Layout, StoredActivations
from vllm_gemma4q.calibration.calibrate import calibrate
from vllm_gemma4q.checkpoint.run import JOURNAL
from vllm_gemma4q.errors import InputError

KIND, LAYERS = "moe", 3
FILES = ("statistics", "fisher")


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """Both files' bytes of a run that was never killed."""
    folder = tmp_path_factory.mktemp("whole")
    reports = run_killed(text, folder, IN_MEMORY)
    assert reports == 1 + SAMPLES * LAYERS + LAYERS
    return {name: (folder / name).read_bytes() for name in FILES}


def run_killed(text, folder, limit, *kill_at):
    command = [sys.executable, Path(__file__).with_name("killed_calibration.py"), KIND, text]
    command += [folder / "statistics", folder / "work", folder / "fisher", limit, *kill_at]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["fisher", "statistics"]
    return int(done.stdout)


def test_killed_and_resumed(text, whole, tmp_path):
    # In layer 0; in layer 1; after the last layer but before the backward pass has finished a layer; one layer later.
    kill_at = [1 + 3, 1 + SAMPLES + 2, 1 + SAMPLES * (LAYERS - 1) + 1, 1 + 1]
    reports = run_killed(text, tmp_path, SPILLED, *kill_at)
    assert reports <= 1 + LAYERS
    for name in FILES:
        assert (tmp_path / name).read_bytes() == whole[name], name


def test_finished_and_other_runs(text, tmp_path):
    run, target, work = calibration(KIND, text), tmp_path / "statistics", tmp_path / "work"
    assert calibrate(run, target, work)
    written = target.stat()
    assert not calibrate(run, target, work)
    assert not calibrate(replace(run, limit=SPILLED), target, work)
    assert (target.stat().st_ino, target.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    with pytest.raises(InputError, match=r"statistics: exists, and was not made by this command"):
        calibrate(calibration(KIND, text, samples=4), target, work)
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"work: not empty, and not an unfinished run"):
        calibrate(run, tmp_path / "other", work)
    assert [path.name for path in work.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("limit", [IN_MEMORY, SPILLED], ids=["in memory", "spilled"])
def test_interrupted_runs(text, tmp_path, limit):
    """One that finished no layer leaves nothing; one that did goes on, but not with other samples."""
    run, target, work = calibration(KIND, text, limit=limit), tmp_path / "statistics", tmp_path / "work"

    def interrupt_at(reports):
        left = iter(range(reports))

        def progress(tokens):
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate(run, target, work, progress=progress)

    interrupt_at(2)
    assert not list(tmp_path.iterdir())
    interrupt_at(SAMPLES + 3)
    assert (work / JOURNAL).exists()
    assert not list(work.glob("*.partial"))
    with pytest.raises(InputError, match=r"holds an unfinished run with another samples, tokens; remove it"):
        calibrate(calibration(KIND, text, limit=limit, samples=4), target, work)
    assert calibrate(run, target, work)
    assert [path.name for path in tmp_path.iterdir()] == ["statistics"]


def test_a_checkpoint_that_cannot_be_read_for_a_moment(text, tmp_path, monkeypatch):
    """As on a network's file system: layers that are done stay, and are not done again."""
    run, target, work = calibration(KIND, text), tmp_path / "statistics", tmp_path / "work"
    load = run.decoder.layer

    def refused(layer):
        if layer == 1:
            monkeypatch.setattr(weights, "_pieces", refuse)
        return load(layer)

    def refuse(buffer):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(run.decoder, "layer", refused)
        patch.setattr(weights, "_pieces", weights._pieces)
        with pytest.raises(InputError, match=r"^model\S*: cannot be read: Input/output error$"):
            calibrate(run, target, work)
    monkeypatch.undo()
    assert (work / JOURNAL).exists() and list(work.glob("*.safetensors"))
    assert calibrate(run, target, work)
    assert [path.name for path in tmp_path.iterdir()] == ["statistics"]


def test_activations_in_a_file(tmp_path):
    layout = Layout([3, 1, 4], 5, torch.bfloat16)
    values = [torch.randn(length, 5, dtype=torch.bfloat16) for length in layout.lengths]
    kept, path = Activations(layout), tmp_path / "a.bin"
    for number, value in enumerate(values):
        kept.put(number, value)
    kept.save(path)
    assert StoredActivations.is_whole(path, layout)
    stored, again = StoredActivations(path, layout), Activations(layout)
    again.load(path)
    for number in (2, 0, 1):
        assert torch.equal(stored.get(number), values[number])
        assert torch.equal(again.get(number), values[number])
    unfinished = StoredActivations(path, layout, new=True)
    unfinished.put(1, values[1])
    assert torch.equal(unfinished.get(1), values[1])
    assert not StoredActivations.is_whole(path, layout)
    path.write_bytes(b"short")
    with pytest.raises(InputError, match=r"a.bin: ended early: got 5 bytes of sample 0, expected 30"):
        StoredActivations(path, layout).get(0)
