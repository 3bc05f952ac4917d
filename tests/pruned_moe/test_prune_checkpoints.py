"""Pruning file to file: what stays is what was, whatever the format, and the configuration says so."""

import hashlib
import json

import made_statistics
import pruned_checkpoints
import pytest
import torch
from prune_files import EXAMPLE, LAYERS, NUM_EXPERTS, config, differences, one_by_one, retained, run, same, write
from pruned_checkpoints import NON_UNIFORM, UNIFORM
from vllm_plugin.checkpoints import edit, fuse_experts, load, text_only

from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.fp8_static import quantize as fp8_static
from vllm_gemma4q.pruned_moe import prune
from vllm_gemma4q.pruned_moe.config import renumbered
from vllm_gemma4q.quark_int8 import quantize as quark_int8

MAPS = {"uniform": UNIFORM, "per-layer": NON_UNIFORM}


@pytest.fixture(scope="module", params=MAPS)
def kept(request):
    return MAPS[request.param]


@pytest.fixture(scope="module")
def pruned(kept, tmp_path_factory):
    """A folder with the example pruned, sharded anew on the way."""
    folder = tmp_path_factory.mktemp("pruned") / "target"
    run(EXAMPLE, folder, kept, max_shard_bytes=1_000_000)
    return folder


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / "int8"
    write(quark_int8.plan(open_checkpoint(EXAMPLE)), folder)
    return folder


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    made_statistics.write_for(EXAMPLE, folder / "statistics")
    write(fp8_static.plan(open_checkpoint(EXAMPLE), folder / "statistics"), folder / "fp8")
    return folder / "fp8"


def experts_of(tensors, layer, kept, old=True):
    """Tensors of a layer's experts, by number among the kept ones."""
    prefix = f"{LAYERS}{layer}.experts."
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            number, _, leaf = name.removeprefix(prefix).partition(".")
            if not old:
                found[int(number), leaf] = tensor
            elif int(number) in kept:
                found[kept.index(int(number)), leaf] = tensor
    return found


def test_what_stays_is_what_torch_slices(kept, pruned, tmp_path):
    expected = pruned_checkpoints.prune(EXAMPLE, tmp_path / "expected", kept)
    assert not differences(load(pruned), load(expected))
    assert config(pruned) == config(expected)
    assert len(list(pruned.glob("model-*.safetensors"))) > 3


def test_shapes_are_those_of_the_new_configuration(kept, pruned):
    architecture = parse_text_architecture(config(pruned))
    assert [layer.num_experts for layer in architecture.layers] == list(map(len, kept))
    tensors = load(pruned)
    for name, shape in architecture.shapes():
        assert tuple(tensors[name].shape) == shape


def test_metadata_says_what_was_kept_and_dropped(kept, pruned):
    metadata = json.loads((pruned / prune.METADATA).read_text())
    assert metadata["num_experts"] == NUM_EXPERTS
    assert metadata["per_layer_keep"] == {str(layer): list(ids) for layer, ids in enumerate(kept)}
    for layer, ids in metadata["per_layer_drop"].items():
        assert sorted([*ids, *kept[int(layer)]]) == list(range(NUM_EXPERTS))
    assert metadata["options"] == {"shared_boost": 1.0, "soft_transfer": 0.0, "top_k": None}


def test_manifest_covers_the_whole_source_and_every_file(pruned):
    manifest = json.loads((pruned / "gemma4q-manifest.json").read_text())
    assert {path.name for path in pruned.iterdir()} == set(manifest["output"]) | {"gemma4q-manifest.json"}
    assert {path.name for path in EXAMPLE.glob("*.safetensors")} < set(manifest["source"])
    for side, folder in (("output", pruned), ("source", EXAMPLE)):
        for name, facts in manifest[side].items():
            content = (folder / name).read_bytes()
            assert (facts["bytes"], facts["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_shard_of_which_nothing_stays_is_hashed_too(tmp_path):
    """Experts one by one, the last of each layer in a shard of their own."""
    tensors, source = one_by_one(load(EXAMPLE)), tmp_path / "source"
    edit(EXAMPLE, source, lambda _: {name: tensor for name, tensor in tensors.items() if ".experts.15." not in name})
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    edit(EXAMPLE, tmp_path / "rest", lambda _: {name: t for name, t in tensors.items() if ".experts.15." in name})
    (tmp_path / "rest" / "model.safetensors").rename(source / "model-00002-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 + ('.experts.15.' in name)}-of-00002.safetensors" for name in tensors}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    run(source, tmp_path / "target", [range(15)] * 3)
    manifest = json.loads((tmp_path / "target" / "gemma4q-manifest.json").read_text())
    shard = source / "model-00002-of-00002.safetensors"
    assert manifest["source"][shard.name]["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()


def test_int8_of_pruned_is_pruned_of_int8(kept, pruned, int8, tmp_path):
    one = run(int8, tmp_path / "pruned-int8", kept)
    other = write(quark_int8.plan(open_checkpoint(pruned)), tmp_path / "int8-pruned")
    assert not differences(one, other)
    assert config(tmp_path / "pruned-int8") == config(tmp_path / "int8-pruned")
    corrupted = one | {"model.language_model.norm.weight": one["model.language_model.norm.weight"] * 2}
    assert differences(corrupted, other) == ["model.language_model.norm.weight"]


def test_weights_of_fp8_commute_and_input_scales_stay(kept, pruned, fp8, tmp_path):
    """Input scales are those that the unpruned model was calibrated with: a layer's experts share theirs."""
    one = run(fp8, tmp_path / "pruned-fp8", kept)
    made_statistics.write_for(pruned, tmp_path / "statistics")
    other = write(fp8_static.plan(open_checkpoint(pruned), tmp_path / "statistics"), tmp_path / "fp8-pruned")
    assert set(one) == set(other)
    assert not [name for name in differences(one, other) if not name.endswith(".input_scale")]
    assert config(tmp_path / "pruned-fp8") == config(tmp_path / "fp8-pruned")
    before = load(fp8)
    for layer, ids in enumerate(kept):
        assert not differences(experts_of(before, layer, ids), experts_of(one, layer, ids, old=False))


def test_experts_one_by_one_are_renumbered(kept, pruned, tmp_path):
    source = edit(EXAMPLE, tmp_path / "source", one_by_one)
    result = run(source, tmp_path / "target", kept)
    assert not differences(result, one_by_one(load(pruned)))
    assert config(tmp_path / "target") == config(pruned)


def test_fused_experts_with_scales_as_others_write_them(kept, int8, tmp_path):
    def foreign(tensors):
        shared = {f"{LAYERS}{layer}.experts.gate_up_proj_input_scale": torch.ones(1) for layer in range(3)}
        return fuse_experts(tensors) | shared

    source = edit(int8, tmp_path / "fused", foreign)
    result = run(source, tmp_path / "target", kept)
    expected = foreign(run(int8, tmp_path / "one-by-one", kept))
    assert f"{LAYERS}0.experts.gate_up_proj_scale" in result
    assert not differences(result, expected)


def test_text_only_checkpoints_have_their_counts_at_the_top(kept, int8, tmp_path):
    source = text_only(int8, tmp_path / "source")
    result = run(source, tmp_path / "target", kept)
    architecture = parse_text_architecture(config(tmp_path / "target"))
    assert [layer.num_experts for layer in architecture.layers] == list(map(len, kept))
    assert same(result["model.layers.1.router.per_expert_scale"],
                load(source)["model.layers.1.router.per_expert_scale"][list(kept[1])])  # fmt: skip


def test_lists_that_name_experts_are_renumbered():
    some = retained([(0, 2, 3), (1, 2, 3)], 4)
    before = {
        "quant_method": "quark",
        "exclude": ["lm_head", "re:.*router.*", *(f"{LAYERS}0.experts.{e}.up_proj" for e in range(4)),
                    "language_model.model.layers.1.experts.3", "model.layers.0.experts", "layers.1.experts.0.up_proj"],
        "layer_quant_config": {f"{LAYERS}1.experts.2.up_proj": {"weight": None}, f"{LAYERS}1.experts.0.up_proj": {}},
        "bits": 8,
    }  # fmt: skip
    assert renumbered(before, some) == {
        "quant_method": "quark",
        "exclude": ["lm_head", "re:.*router.*", *(f"{LAYERS}0.experts.{e}.up_proj" for e in range(3)),
                    "language_model.model.layers.1.experts.2", "model.layers.0.experts"],
        "layer_quant_config": {f"{LAYERS}1.experts.1.up_proj": {"weight": None}},
        "bits": 8,
    }  # fmt: skip


def test_nothing_dropped_is_a_copy(tmp_path):
    assert not differences(run(EXAMPLE, tmp_path / "target", [range(NUM_EXPERTS)] * 3), load(EXAMPLE))
    assert config(tmp_path / "target") == config(EXAMPLE)


def test_pruned_twice_is_pruned_once(tmp_path):
    """The second metadata file takes the place of the first, which is not copied."""
    run(EXAMPLE, tmp_path / "first", UNIFORM)
    second = [(0, 1, 2, 4, 5, 7, 9, 11)] * 3
    result = run(tmp_path / "first", tmp_path / "second", second, num_experts=12)
    both = [[kept[expert] for expert in ids] for kept, ids in zip(UNIFORM, second, strict=True)]
    assert not differences(result, run(EXAMPLE, tmp_path / "once", both))
    assert json.loads((tmp_path / "second" / prune.METADATA).read_text())["num_experts"] == 12


def test_uniform_again_after_a_list_of_equal_counts(tmp_path):
    source = edit(EXAMPLE, tmp_path / "source")
    listed = config(source)
    listed["text_config"]["num_experts_per_layer"] = [NUM_EXPERTS] * 3
    (source / "config.json").write_text(json.dumps(listed))
    run(source, tmp_path / "target", UNIFORM)
    assert "num_experts_per_layer" not in config(tmp_path / "target")["text_config"]


def test_summary_counts_what_goes(kept):
    conversion = prune.plan(open_checkpoint(EXAMPLE), retained(kept))
    experts, rest = conversion.summary["experts"], conversion.summary["attention"]
    share = sum(map(len, kept)) / (3 * NUM_EXPERTS)
    assert experts["parameters_after"] == experts["parameters_before"] * share
    assert (rest["bytes_before"], rest["parameters_before"]) == (rest["bytes_after"], rest["parameters_after"])
    total = conversion.summary["total"]
    assert total["bytes_after"] == sum(shard.n_bytes for shard in conversion.shards)
    assert total["bytes_before"] - total["bytes_after"] > 0.9 * (experts["bytes_before"] - experts["bytes_after"])
