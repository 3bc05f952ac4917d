"""Steps that gather slices of a tensor: any ranges, any block size, the bytes that torch would take."""

import hashlib
import json
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import Conversion, convert
from vllm_gemma4q.checkpoint.steps import OutputTensor, Step

SHAPES = {"cube": (13, 5, 7), "matrix": (13, 300), "vector": (13,)}
BLOCK_BYTES = 100  # no multiple of any row


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices") / "source"
    folder.mkdir()
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()} | {"rest": torch.randn(1000)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return open_checkpoint(folder)


def conversion(source, slices, **files):
    count = sum(stop - start for start, stop in slices)
    steps = [
        Step(tensor, (OutputTensor(name, tensor.dtype, (count, *tensor.shape[1:])),), slices=slices)
        for name, tensor in source.tensors.items()
        if name in SHAPES
    ]
    return Conversion("test", source, steps, {}, {}, files=files)


@st.composite
def ranges(draw):
    edges = sorted(draw(st.sets(st.integers(0, 13), min_size=2)))
    return tuple(zip(edges[::2], edges[1::2], strict=False))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(slices=ranges())
def test_slices_are_gathered(source, tmp_path_factory, slices):
    target, consumed = tmp_path_factory.mktemp("gathered") / "target", []
    plan = conversion(source, slices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["vllm_gemma4q.checkpoint.rewrite"], "BLOCK_BYTES", BLOCK_BYTES)
        assert convert(plan, target, ["test"], consumed.append)
    before, after = load_file(source.shards[0]), load_file(target / "model.safetensors")
    rows = [row for start, stop in slices for row in range(start, stop)]
    assert set(after) == set(SHAPES)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name][rows])
    assert sum(consumed) == plan.source_bytes == sum(tensor.nbytes for tensor in after.values())
    assert max(consumed) <= BLOCK_BYTES
    manifest = json.loads((target / "gemma4q-manifest.json").read_text())
    digest = hashlib.sha256(source.shards[0].read_bytes()).hexdigest()
    assert manifest["source"]["model.safetensors"]["sha256"] == digest


def test_slices_and_files_are_part_of_the_identity(source):
    plans = [
        conversion(source, ((0, 3), (4, 6))),
        conversion(source, ((0, 3), (5, 7))),
        conversion(source, ((0, 5),)),
        conversion(source, ((0, 5),), notes=b"one"),
        conversion(source, ((0, 5),), notes=b"other"),
    ]
    assert len({plan.identity()["plan"] for plan in plans}) == len(plans)


def test_slices_are_never_transformed(source):
    tensor = source.tensors["matrix"]
    with pytest.raises(ValueError, match="matrix: slices are copied"):
        Step(tensor, (OutputTensor("matrix", "BF16", (1, 300)),), lambda rows, out: None, slices=((0, 1),))


def test_own_files_take_the_place_of_the_sources(source, tmp_path):
    (source.folder / "notes.json").write_text("old")
    try:
        convert(conversion(source, ((0, 5),), **{"notes.json": b"new"}), tmp_path / "target", ["test"], lambda _: None)
    finally:
        (source.folder / "notes.json").unlink()
    assert (tmp_path / "target" / "notes.json").read_bytes() == b"new"
    manifest = json.loads((tmp_path / "target" / "gemma4q-manifest.json").read_text())
    assert manifest["output"]["notes.json"] == {"bytes": 3, "sha256": hashlib.sha256(b"new").hexdigest()}
    assert "notes.json" not in manifest["source"]


def test_bytes_are_copied_to_what_they_mean(source):
    tensor = source.tensors["matrix"]
    with pytest.raises(ValueError, match=f"matrix: copying {tensor.dtype} to matrix of F16"):
        Step(tensor, (OutputTensor("matrix", "F16", tensor.shape),))
    with pytest.raises(ValueError, match=r"matrix: copying \d+ bytes to \d+"):
        Step(tensor, (OutputTensor("matrix", tensor.dtype, (1, *tensor.shape)[:-1]),))
