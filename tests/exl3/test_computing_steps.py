"""Steps that compute from all their rows: bytes, notes, shards by group, kills, memory, refusals."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from computing_run import column_sums, plan
from peak_memory import measure
from safetensors.torch import load_file, save_file
from synthetic import write_header_only

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.checkpoint.steps import Computed, OutputTensor, Step
from vllm_gemma4q.errors import InputError

SCRIPT = Path(__file__).with_name("computing_run.py")
MB = 1_000_000


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("computing") / "source"
    folder.mkdir()
    tensors = {f"matrix_{rows}": torch.randn(rows, 24).bfloat16() for rows in (10, 20, 30, 40, 50)}
    save_file(tensors | {"vector": torch.randn(1000)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_outputs_notes_and_progress(source, tmp_path):
    conversion, consumed = plan(open_checkpoint(source)), []
    assert convert(conversion, tmp_path / "target", ["test"], consumed.append)
    before = load_file(source / "model.safetensors")
    matrices = {name: tensor for name, tensor in before.items() if tensor.dim() == 2}
    after = {}
    for path in (tmp_path / "target").glob("*.safetensors"):
        after |= load_file(path)
    for name, matrix in matrices.items():
        assert torch.equal(after[f"{name}.sums"], column_sums(matrix, lambda _: None).tensors[0])
    assert torch.equal(after["vector"], before["vector"])
    assert sum(consumed) == conversion.source_bytes
    details = json.loads((tmp_path / "target" / "gemma4q-manifest.json").read_text())["details"]
    assert set(details["sums"]) == {f"{len(matrix)} rows" for matrix in matrices.values()}


def test_groups_never_share_a_shard(source):
    conversion = plan(open_checkpoint(source))
    assert [{step.group for step in shard.steps} for shard in conversion.shards] == [{""}, {"0"}, {"1"}, {"2"}]


def test_killed_twice_and_resumed_is_byte_identical(source, tmp_path):
    """Also the manifest, whose notes come from the journal for shards that another process wrote."""
    target, consumed = tmp_path / "target", []
    convert(plan(open_checkpoint(source)), tmp_path / "whole", ["test"], consumed.append)
    assert len(consumed) == 11
    for files, at in ((1, 2), (3, 9)):  # in the first matrix; resumed, in the last file
        killed = subprocess.run([sys.executable, SCRIPT, source, target, str(at)], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert not (target / "config.json").exists()
        assert len(list(target.glob("*.safetensors"))) == files, "finished before the kill"
    convert(plan(open_checkpoint(source)), target, ["test"], consumed.append)
    assert content(target) == content(tmp_path / "whole")


def test_memory_is_that_of_one_step(tmp_path):
    """Five matrices of 100 MB: one is held at a time, with its result."""
    names = [(f"matrix_{index}", (1000, 50_000)) for index in range(5)]
    source = write_header_only(tmp_path / "source", {}, names)
    command = [sys.executable, SCRIPT, source, tmp_path / "target", "0"]
    empty = write_header_only(tmp_path / "small", {}, [("matrix", (2, 2))])
    base = measure([sys.executable, SCRIPT, empty, tmp_path / "other", "0"]).peak_bytes
    assert measure(command).peak_bytes < base + 300 * MB, "a matrix, and half of one in float32"


def test_torch_has_its_threads_back_while_computing(source, tmp_path):
    seen = []

    def compute(rows, progress):
        seen.append(torch.get_num_threads())
        return column_sums(rows, progress)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        convert(plan(open_checkpoint(source), compute), tmp_path / "target", ["test"], lambda _: None)
        assert set(seen) == {torch.get_num_threads()} == {3}
    finally:
        torch.set_num_threads(before)


def test_a_refused_matrix_is_named_and_nothing_stays(source, tmp_path):
    def compute(rows, progress):
        if len(rows) == 30:
            raise ValueError("got thirty rows, expected none")
        return column_sums(rows, progress)

    with pytest.raises(InputError, match="tensor matrix_30, from row 0: got thirty rows, expected none"):
        convert(plan(open_checkpoint(source), compute), tmp_path / "target", ["test"], lambda _: None)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("wrong", [torch.zeros(24, dtype=torch.float64), torch.zeros(23)], ids=["dtype", "shape"])
def test_a_result_of_another_kind_is_a_bug(source, tmp_path, wrong):
    with pytest.raises(AssertionError, match=r"matrix_10\.sums"):
        convert(
            plan(open_checkpoint(source), lambda rows, _: Computed([wrong], {})),
            tmp_path / "target",
            ["test"],
            lambda _: None,
        )
    assert not (tmp_path / "target" / "config.json").exists()


def test_one_way_of_making_outputs(source):
    tensor = open_checkpoint(source).tensors["matrix_10"]
    outputs = (OutputTensor("sums", "F32", (24,)),)
    with pytest.raises(ValueError, match="a transform and a computation"):
        Step(tensor, outputs, lambda rows, out: None, compute=column_sums)
    with pytest.raises(ValueError, match="slices are copied"):
        Step(tensor, outputs, compute=column_sums, slices=((0, 1),))
