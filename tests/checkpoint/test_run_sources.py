"""What happens to a source while a run reads it, and to a target that is finished."""

import json
import os
import shutil

import pytest
from synthetic import small_config, write_checkpoint

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.checkpoint.run import JOURNAL, MANIFEST
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.quark_int8 import quantize


@pytest.fixture
def source(tmp_path):
    folder = write_checkpoint(tmp_path / "source", small_config(moe=True), shards=2)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


def run(source, target, progress=lambda _: None):
    return convert(quantize.plan(open_checkpoint(source), max_shard_bytes=60_000), target, ["test"], progress)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_small_files_that_come_meanwhile_cost_nothing(source, target):
    """Somebody's notes while it runs, a better chat template before it is resumed."""
    calls = []

    def interrupt(n_bytes):
        calls.append(n_bytes)
        if len(calls) == 20:
            (source / "notes.txt").write_text("half way")
        if len(calls) == 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, target, interrupt)
    finished = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    assert finished
    (source / "notes.txt").unlink()
    (source / "tokenizer.json").write_text('{"better": true}')

    def note(_):
        (source / "later.txt").write_text("nearly done")

    assert run(source, target, note)
    assert {name: (target / name).stat().st_mtime_ns for name in finished} == finished
    assert (target / "tokenizer.json").read_text() == '{"better": true}'
    assert not (target / "later.txt").exists() and not (target / "notes.txt").exists()
    written = json.loads((target / MANIFEST).read_text())
    assert written["source"]["tokenizer.json"] == written["output"]["tokenizer.json"]
    assert written["source"].keys() == content(source).keys() - {"later.txt", "model.safetensors.index.json"}


def test_a_source_that_goes_away_at_the_end(source, target, tmp_path):
    """As a network's file system does: what is finished stays."""
    planned = quantize.plan(open_checkpoint(source), max_shard_bytes=60_000)
    read = []

    def progress(n_bytes):
        read.append(n_bytes)
        if sum(read) == planned.source_bytes:
            source.rename(tmp_path / "away")

    with pytest.raises(InputError, match="cannot be read: No such file or directory"):
        convert(planned, target, ["test"], progress)
    assert (target / JOURNAL).exists() and list(target.glob("*.safetensors"))
    (tmp_path / "away").rename(source)
    assert run(source, target)


def test_a_small_file_that_cannot_be_read_is_found_first(source, target):
    if os.geteuid() == 0:
        (source / "vocab.txt").symlink_to("vocab.txt")  # nobody may be refused as root, but a link to itself can
    else:
        (source / "vocab.txt").touch(0)
    with pytest.raises(InputError, match="vocab.txt: "):
        run(source, target)
    assert not target.exists()


def test_a_link_to_nothing_is_not_left_out(source, target):
    """A copy of a snapshot of the Hub's cache whose blobs stayed behind."""
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("../../blobs/abc")
    (source / "hidden.bin").symlink_to("../../blobs/def")
    with pytest.raises(
        InputError, match=r"^tokenizer.json: a link to ../../blobs/abc, where nothing is, expected a file$"
    ):
        run(source, target)
    assert not target.exists()


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_finished_target_that_is_damaged_is_not_called_complete(source, target, damage):
    assert run(source, target)
    shard = sorted(target.glob("*.safetensors"))[1]
    size = shard.stat().st_size
    shard.unlink() if damage == "gone" else os.truncate(shard, size - 4000)
    before = content(target)
    found = "no file" if damage == "gone" else f"{size - 4000:,} bytes"
    with pytest.raises(
        InputError, match=rf"{shard.name}: got {found}, expected {size:,} bytes; remove .*target to start"
    ):
        run(source, target)
    assert content(target) == before
    shutil.rmtree(target)
    assert run(source, target) and not run(source, target)


def test_a_small_file_that_changed_since_is_told(source, target):
    assert run(source, target)
    (source / "tokenizer.json").write_text('{"better": true}')
    with pytest.raises(
        InputError, match=r"tokenizer.json: changed since .*target was finished; copy it there, or remove"
    ):
        run(source, target)
    shutil.copy(source / "tokenizer.json", target)
    assert not run(source, target)
