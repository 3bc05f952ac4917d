"""Predicted sizes and types against what a real llama-quantize wrote, recorded and live."""

import numpy as np
import pytest
from gemma4q_kernels.ggml import QUANTIZABLE_TYPES, GGMLQuantizationType, tensor_bytes
from gguf_files import REAL_31B, gemma4_metadata, moe_26b_a4b, real_31b, write_gguf, write_split
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_quantize import (
    IMATRIX,
    MODEL,
    OUTPUT,
    imatrix_of,
    outcomes,
    record,
    run,
    small_model,
    types_of_dry_run,
)

from gguf_mixed.errors import InputError
from gguf_mixed.file_size import header_bytes, metadata_changes, predict_size
from gguf_mixed.imatrix import Imatrix, ImatrixEntry
from gguf_mixed.imatrix_gguf import write_imatrix
from gguf_mixed.tensors import read_inventory, written_types

T = GGMLQuantizationType
ENTRY = ImatrixEntry(np.ones((1, 1), np.float32), np.array([1]))
# One of each kind: legal, each fallback, to F16, a float, one that stops. The rest is in the record.
LIVE_TYPES = (T.Q4_K, T.Q5_K, T.Q6_K, T.Q3_K, T.IQ4_XS, T.IQ4_NL, T.MXFP4, T.Q8_0, T.BF16, T.NVFP4)


@pytest.fixture(scope="module")
def inventory(tmp_path_factory):
    return read_inventory(small_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("qtype", QUANTIZABLE_TYPES, ids=lambda qtype: qtype.name)
def test_recorded_outcomes_are_predicted(inventory, qtype):
    asked = dict.fromkeys(inventory.tensors, qtype)
    found = record()[qtype.name]
    if "stops" in found:
        with pytest.raises(InputError, match="no substitute"):
            predict_size(inventory, asked)
        return
    assert {name: written.name for name, written in written_types(inventory, asked).items()} == found["types"]
    assert predict_size(inventory, asked, metadata_changes(imatrix_of(inventory), IMATRIX)) == found["size"]


def test_the_record_is_what_llama_quantize_does(llama_quantize, tmp_path):
    recorded = record()
    assert outcomes(tmp_path, LIVE_TYPES) == {qtype.name: recorded[qtype.name] for qtype in LIVE_TYPES}


def test_overridden_keys(llama_quantize, tmp_path):
    inventory = read_inventory(small_model(tmp_path))
    alias = "hé" * 20
    overrides = {"general.file_type": 15, "new.flag": True, "new.number": 1.5, "general.alias": alias}
    written = ["general.file_type=int:15", "new.flag=bool:true", "new.number=float:1.5", f"general.alias=str:{alias}"]
    arguments = [part for item in written for part in ("--override-kv", item)]
    asked = dict.fromkeys(inventory.tensors, T.Q4_1)
    assert run(tmp_path, asked, *arguments).returncode == 0
    assert (tmp_path / OUTPUT).stat().st_size == predict_size(inventory, asked, metadata_changes(overrides=overrides))


@pytest.mark.parametrize("offset", range(32))
def test_changed_keys_take_the_room_that_the_package_gives_them(tmp_path, offset):
    """At every position within the padding, so that it cannot hide a byte."""
    kept = "k" * offset
    before = {"split.no": 0, "split.count": 1, "split.tensors.count": 1, "kept": kept, "replaced": "long text"}
    changes = metadata_changes(Imatrix({"a": ENTRY}, ("first", "second"), 0), "é" * 90, {"replaced": True, "new": 1.5})
    after = {
        "kept": kept, "replaced": True, "new": 1.5, "general.quantization_version": 2, "general.file_type": 7,
        "quantize.imatrix.file": "x" * 127, "quantize.imatrix.dataset": "first", "quantize.imatrix.entries_count": 1,
    }  # fmt: skip
    listed = [("a.weight", (256, 3), T.BF16), ("b.weight", (33,), T.F32)]
    inventory = read_inventory(write_gguf(tmp_path / "before.gguf", listed, before))
    expected = write_gguf(tmp_path / "after.gguf", listed, after)
    assert predict_size(inventory, {}, changes) == expected.stat().st_size
    assert read_inventory(expected).headers[0].data_start == header_bytes(inventory, changes)


def test_a_long_imatrix_path_is_cut(llama_quantize, tmp_path):
    inventory = read_inventory(small_model(tmp_path))
    name = "é" * 100 + ".gguf"
    write_imatrix(imatrix_of(inventory), tmp_path / name)
    assert run(tmp_path, {}, "--imatrix", name).returncode == 0
    types = {key: tensor.qtype for key, tensor in read_inventory(tmp_path / OUTPUT).tensors.items()}
    changes = metadata_changes(imatrix_of(inventory), name)
    assert (tmp_path / OUTPUT).stat().st_size == predict_size(inventory, types, changes)


def test_split_models_become_one_file(llama_quantize, tmp_path):
    listed = [(f"blk.{layer}.attn_q.weight", (256, 4), T.BF16) for layer in range(5)]
    first = write_split(tmp_path, listed, 2, gemma4_metadata(5, 256, 256))[0]
    inventory = read_inventory(first)
    asked = dict.fromkeys(inventory.tensors, T.Q4_K)
    assert run(tmp_path, asked, model=first.name).returncode == 0
    assert (tmp_path / OUTPUT).stat().st_size == predict_size(inventory, asked)


def test_another_alignment_breaks_the_output(llama_quantize, tmp_path):
    """Why `header_bytes` refuses it: llama-quantize exits with 0, and what it wrote cannot be read."""
    inventory = read_inventory(small_model(tmp_path, alignment=64))
    with pytest.raises(InputError, match="general.alignment is 64; llama-quantize pads to 32"):
        header_bytes(inventory)
    assert run(tmp_path, dict.fromkeys(inventory.tensors, T.Q8_0)).returncode == 0
    with pytest.raises(InputError, match="data at offset"):
        read_inventory(tmp_path / OUTPUT)


REAL_SIZES = [
    ("26B-A4B", lambda: moe_26b_a4b(), gemma4_metadata(30, 2816, 2112, 128)),
    ("26B-A4B-98e", lambda: moe_26b_a4b(98), gemma4_metadata(30, 2816, 2112, 98)),
    ("31B", real_31b, gemma4_metadata(60, 5376, 21504)),
]


@pytest.mark.parametrize(("label", "tensors", "metadata"), REAL_SIZES, ids=[item[0] for item in REAL_SIZES])
def test_real_shapes_against_a_dry_run(llama_quantize, tmp_path, label, tensors, metadata):
    if label == "31B" and not REAL_31B.exists():
        pytest.skip(f"{REAL_31B.name} is not here")
    inventory = read_inventory(write_gguf(tmp_path / MODEL, tensors(), metadata))
    for qtype in (T.IQ3_S, T.Q4_K, T.Q6_K, T.IQ4_XS):
        asked = dict.fromkeys(inventory.tensors, qtype)
        finished = run(tmp_path, asked, dry=True)
        log = finished.stdout + finished.stderr
        assert finished.returncode == 0
        types = written_types(inventory, asked)
        assert types_of_dry_run(log) == types
        mib = sum(tensor_bytes(types[name], tensor.shape) for name, tensor in inventory.tensors.items()) / 2**20
        assert f"quant size  = {mib:8.2f} MiB" in log


@pytest.mark.parametrize(("mix", "published_gb"), [("IQ3_M", 9.81), ("Q6_K", 17.79)])
def test_published_sizes_of_the_98_expert_model(llama_quantize, tmp_path, mix, published_gb):
    """The stock mixes of the published GGUF files; theirs hold a vocabulary of about 15 MB too."""
    path = write_gguf(tmp_path / MODEL, moe_26b_a4b(98), gemma4_metadata(30, 2816, 2112, 98))
    inventory = read_inventory(path)
    finished = run(tmp_path, {}, dry=True, base=mix)
    types = types_of_dry_run(finished.stdout + finished.stderr)
    assert predict_size(inventory, types) / 1e9 == pytest.approx(published_gb, abs=0.015)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_size_is_monotonic_in_every_tensor(inventory, data):
    """A larger type for one tensor never makes the file smaller, and changes nothing but that tensor's bytes."""
    name = data.draw(st.sampled_from([tensor.name for tensor in inventory.tensors.values() if not tensor.kept_because]))
    tensor = inventory.tensors[name]
    small, large = sorted(data.draw(st.tuples(*[st.sampled_from(tensor.legal_types)] * 2)), key=tensor.bytes_as)
    difference = predict_size(inventory, {name: large}) - predict_size(inventory, {name: small})
    exact = tensor.bytes_as(large) - tensor.bytes_as(small)
    assert difference >= 0
    assert abs(difference - exact) < 32
