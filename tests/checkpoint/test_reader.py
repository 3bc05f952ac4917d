"""Opening checkpoint folders: index and shards must agree, and nothing outside the folder is touched."""

import json

import pytest
from synthetic import small_config, write_checkpoint

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.errors import InputError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "source", small_config(), shards=3)


def edit_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_sharded_and_single_file_hold_the_same(tmp_path, folder):
    single = open_checkpoint(write_checkpoint(tmp_path / "single", small_config()))
    sharded = open_checkpoint(folder)
    assert {name: (t.dtype, t.shape) for name, t in single.tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in sharded.tensors.items()
    }
    assert len(sharded.shards) == 3


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "model.bin", 7])
def test_index_may_only_name_files_of_the_folder(folder, shard):
    edit_index(folder, lambda weight_map: weight_map.update({"model.language_model.norm.weight": shard}))
    with pytest.raises(InputError, match="model.language_model.norm.weight: .* is not the name of a safetensors file"):
        open_checkpoint(folder)


def test_missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match="shard model-00002-of-00003.safetensors is missing"):
        open_checkpoint(folder)


def test_tensor_listed_but_not_stored(folder):
    edit_index(folder, lambda weight_map: weight_map.update(ghost="model-00001-of-00003.safetensors"))
    with pytest.raises(InputError, match="tensor ghost is missing from model-00001"):
        open_checkpoint(folder)


def test_tensor_stored_but_not_listed(folder):
    edit_index(folder, lambda weight_map: weight_map.pop("model.language_model.norm.weight"))
    with pytest.raises(InputError, match=r"model.language_model.norm.weight of .* is not listed"):
        open_checkpoint(folder)


def test_tensor_in_another_shard_than_listed(folder):
    edit_index(
        folder,
        lambda weight_map: weight_map.update({"model.language_model.norm.weight": "model-00001-of-00003.safetensors"}),
    )
    with pytest.raises(
        InputError, match=r"model.language_model.norm.weight: got model-00001.*, stored in model-0000[23]"
    ):
        open_checkpoint(folder)


def test_pickles_are_never_opened(folder):
    for shard in [*folder.glob("*.safetensors"), folder / INDEX]:
        shard.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"only pickle files \(pytorch_model.bin\)"):
        open_checkpoint(folder)


def test_shards_without_an_index(folder):
    (folder / INDEX).unlink()
    with pytest.raises(InputError, match="3 safetensors files but no model.safetensors.index.json"):
        open_checkpoint(folder)


def test_not_a_folder(tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        open_checkpoint(tmp_path / "absent")
