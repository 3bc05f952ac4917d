"""The tensors of a model: what llama-quantize leaves alone, split files, and the two published Gemma 4 models."""

import pytest
from gemma4q_kernels.ggml import QUANTIZABLE_TYPES, GGMLQuantizationType
from gguf_files import BF16, F32, REAL_31B, gemma4_metadata, moe_26b_a4b, real_31b, write_gguf, write_split

from gguf_mixed.errors import InputError
from gguf_mixed.roles import group_by_role, ranges
from gguf_mixed.tensors import read_inventory, written_types

T = GGMLQuantizationType


def inventory_of(folder, *listed, **options):
    return read_inventory(write_gguf(folder / "model.gguf", listed, **options))


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("blk.0.attn_q.weight", (256, 8), None),
        ("blk.0.ffn_down_exps.weight", (704, 8, 4), None),
        ("per_layer_token_embd.weight", (256, 8), None),
        ("blk.0.per_layer_inp_gate.weight", (256, 8), None),
        ("blk.0.attn_norm.weight", (256,), "1-D"),
        ("blk.0.attn_q.weight", (256, 1, 1), "1-D"),
        ("blk.0.attn_q.bias", (256, 8), "not named weight"),
        ("blk.0.ffn_down_exps.scale", (4, 2), "not named weight"),
        ("blk.0.strange_norm.weight", (256, 8), "_norm.weight"),
        ("blk.0.ffn_gate_inp.weight", (256, 8), "ffn_gate_inp.weight"),
        ("per_layer_model_proj.weight", (256, 8), "per_layer_model_proj"),
        ("token_types.weight", (256, 8), "token_types.weight"),
    ],
)
def test_what_is_never_quantized(tmp_path, name, shape, reason):
    tensor = inventory_of(tmp_path, (name, shape, F32)).tensors[name]
    assert tensor.kept_because == reason
    assert tensor.written_type(T.Q8_0) == (T.F32 if reason else T.Q8_0)
    assert (tensor.legal_types == (T.F32,)) == bool(reason)


def test_properties_of_a_tensor(tmp_path):
    tensor = inventory_of(tmp_path, ("blk.12.ffn_down_exps.weight", (704, 8, 4), BF16)).tensors.popitem()[1]
    assert (tensor.layer, tensor.role, tensor.n_matrices) == (12, "ffn_down_exps.weight", 4)
    assert (tensor.row_length, tensor.n_elements, tensor.n_bytes) == (704, 704 * 32, 704 * 64)
    assert tensor.bytes_as(T.Q4_K) == 704 * 32 * 22 // 32  # Q5_0


@pytest.mark.parametrize(
    ("name", "qtype", "needed"),
    [
        ("blk.0.attn_q.weight", T.IQ2_S, True),
        ("blk.0.attn_q.weight", T.IQ3_S, False),
        ("blk.0.attn_norm.weight", T.IQ2_S, False),
        ("token_embd.weight", T.IQ2_S, False),
        ("token_embd.weight", T.IQ2_XS, True),  # exempt by llama-quantize, and then ggml aborts
    ],
)
def test_who_needs_an_imatrix(tmp_path, name, qtype, needed):
    shape = (256,) if name.endswith("norm.weight") else (256, 8)
    assert inventory_of(tmp_path, (name, shape, F32)).tensors[name].requires_imatrix(qtype) == needed


def test_fallback_to_a_type_that_needs_no_imatrix(tmp_path):
    tensor = inventory_of(tmp_path, ("blk.0.ffn_down.weight", (2112, 8), BF16)).tensors.popitem()[1]
    assert not tensor.requires_imatrix(T.IQ2_S)


@pytest.mark.parametrize(
    ("source", "asked", "message"),
    [
        (F32, T.Q8_K, "tensor a.weight: nothing can be quantized to Q8_K"),
        (F32, T.NVFP4, "tensor a.weight: rows of 96 are not a multiple of 64, and llama-quantize has no substitute"),
        (T.I32, T.Q8_0, "tensor a.weight: llama-quantize cannot convert I32"),
    ],
)
def test_where_llama_quantize_would_stop(tmp_path, source, asked, message):
    inventory = inventory_of(tmp_path, ("a.weight", (96, 2), source))
    with pytest.raises(InputError, match=message):
        written_types(inventory, {"a.weight": asked})


def test_assignment_of_a_tensor_that_is_not_there(tmp_path):
    inventory = inventory_of(tmp_path, ("a.weight", (96, 2), F32))
    with pytest.raises(InputError, match="tensor b.weight: assigned a type, but model.gguf has no such tensor"):
        written_types(inventory, {"b.weight": T.Q8_0})


def test_split_files_are_one_model(tmp_path):
    listed = [(f"blk.{layer}.attn_q.weight", (64, 4), BF16) for layer in range(5)]
    paths = write_split(tmp_path, listed, 2)
    assert [path.name for path in paths] == [f"m-0000{index}-of-00003.gguf" for index in (1, 2, 3)]
    inventory = read_inventory(paths[0])
    assert list(inventory.tensors) == [name for name, _, _ in listed]
    assert inventory.tensors["blk.4.attn_q.weight"].path == paths[2]
    assert inventory.file_bytes == sum(path.stat().st_size for path in paths)


def test_broken_splits(tmp_path):
    first, second, third = write_split(tmp_path, [(f"blk.{index}.x.weight", (64, 4), BF16) for index in range(5)], 2)
    with pytest.raises(InputError, match="m-00002-of-00003.gguf: is file 1 .split.no. of 3, expected the first, 0"):
        read_inventory(second)
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(InputError, match="renamed.gguf: has 3 files, expected a name ending in -00001-of-00003.gguf"):
        read_inventory(renamed)
    renamed.rename(first)
    kept = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(InputError, match="m-00002-of-00003.gguf: split.no is 2, expected 1"):
        read_inventory(first)
    second.write_bytes(kept)
    third.unlink()
    with pytest.raises(InputError, match="m-00003-of-00003.gguf: cannot be read: No such file"):
        read_inventory(first)


def test_a_file_without_tensors(tmp_path):
    with pytest.raises(InputError, match="model.gguf: holds no tensors"):
        inventory_of(tmp_path, metadata={"a": 1})


def test_an_already_quantized_model_is_told_apart(tmp_path):
    assert not inventory_of(tmp_path, ("a.weight", (64, 2), BF16), ("b.weight", (64,), T.Q8_0)).already_quantized
    assert inventory_of(tmp_path, ("a.weight", (64, 2), T.Q8_0)).already_quantized


def test_every_fallback_of_the_26b_a4b_is_priced(tmp_path):
    path = write_gguf(tmp_path / "26b.gguf", moe_26b_a4b(), gemma4_metadata(30, 2816, 2112, 128))
    inventory = read_inventory(path)
    assert inventory.n_elements == 25_233_142_046
    groups = {group.role: group for group in group_by_role(inventory) if group.fallbacks}
    assert set(groups) == {"ffn_down.weight", "ffn_down_exps.weight"}
    bpw = {"IQ4_NL": 4.5, "Q4_0": 4.5, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5}
    for group in groups.values():
        asked = {item.requested.name: item for item in group.fallbacks}
        assert set(asked) | {qtype.name for qtype in group.legal_types} == {qtype.name for qtype in QUANTIZABLE_TYPES}
        assert asked.pop("Q1_0").written is None
        for name, item in asked.items():
            assert item.n_bytes == group.n_elements * bpw[item.written.name] / 8, name
            assert item.bpw == bpw[item.written.name]
        assert {name for name, item in asked.items() if item.written is T.Q5_0} == {"Q4_K"}


def test_the_groups_add_up(tmp_path):
    inventory = read_inventory(write_gguf(tmp_path / "98e.gguf", moe_26b_a4b(98)))
    groups = group_by_role(inventory)
    assert inventory.n_elements == 19_877_953_946
    assert sum(group.n_bytes for group in groups) == inventory.tensor_bytes
    assert sum(len(group.tensors) for group in groups) == len(inventory.tensors) == 658
    assert sorted(groups, key=lambda group: -group.n_bytes)[0].role == groups[0].role == "ffn_gate_up_exps.weight"


@pytest.mark.skipif(not REAL_31B.exists(), reason=f"{REAL_31B.name} of the real 31B is not here")
def test_real_31b_inventory(tmp_path):
    listed = real_31b()
    inventory = read_inventory(write_gguf(tmp_path / "31b.gguf", listed, gemma4_metadata(60, 5376, 21504)))
    assert (len(inventory.tensors), inventory.n_elements) == (833, 30_697_345_596)
    quantizable = [tensor for tensor in inventory.tensors.values() if not tensor.kept_because]
    assert all(len(tensor.legal_types) == len(QUANTIZABLE_TYPES) for tensor in quantizable)
    assert len(quantizable) == 1 + 60 * 6 + 50  # embeddings; q, k, output, gate, up, down; v of the sliding layers
    assert not any(group.fallbacks for group in group_by_role(inventory))


@pytest.mark.parametrize(("ids", "text"), [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([0, 2, 3, 9], "0, 2-3, 9")])
def test_ranges(ids, text):
    assert ranges(ids) == text
