"""What cannot be pruned: one clear line, before anything is written."""

import json

import pytest
import torch
from prune_files import EXAMPLE, LAYERS, retained
from vllm_plugin.checkpoints import edit

from gguf_mixed.drop_map import RetainedExperts
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.pruned_moe.config import check_pattern
from vllm_gemma4q.pruned_moe.prune import Options, plan

ALL = RetainedExperts.all_of(16, 3)


def changed(folder, tensors=lambda tensors: tensors, **text):
    edit(EXAMPLE, folder, tensors)
    content = json.loads((folder / "config.json").read_text())
    content["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(content))
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    ("choice", "options", "message"),
    [
        (RetainedExperts.all_of(16, 4), None, "got 4 layers, the model has 3"),
        (RetainedExperts.all_of(128, 3), None, "chosen among 128 a layer, the model has 16"),
        (retained([range(12), range(3), range(12)]), None, r"layer 1: 3 of 16 experts left, expected at least 4"),
        (retained([range(12), (), range(12)]), None, "layer 1: 0 of 16 experts left"),
        (retained([range(12)] * 3), Options(top_k=13), r"layer 0: 12 of 16 experts left, expected at least 13"),
        (ALL, Options(top_k=17), r"16 of 16 experts left, expected at least 17"),
        (retained([range(12), (0, 1, 2, 2, 5), range(12)]), None, "layer 1: got experts .* ascending"),
        (retained([range(12), (0, 1, 5, 4), range(12)]), None, "layer 1: got experts .* ascending"),
        (retained([range(5, 17)] * 3), None, r"layer 0: got experts .* ids of 0..15"),
    ],
)
def test_choices_that_do_not_fit(choice, options, message):
    with pytest.raises(InputError, match=message):
        plan(open_checkpoint(EXAMPLE), choice, options)


def test_fewer_experts_than_top_k_are_fine_with_a_smaller_top_k():
    config = plan(open_checkpoint(EXAMPLE), retained([range(3)] * 3), Options(top_k=2)).config
    assert (config["text_config"]["num_experts"], config["text_config"]["top_k_experts"]) == (3, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"shared_boost": 0},
        {"shared_boost": float("nan")},
        {"soft_transfer": -0.1},
        {"soft_transfer": 1.5},
        {"top_k": 0},
    ],
    ids=str,
)
def test_options_out_of_range(options):
    with pytest.raises(InputError, match="expected"):
        Options(**options)


def test_dense_model():
    with pytest.raises(InputError, match="got a dense model"):
        plan(open_checkpoint(EXAMPLE.with_name("dense")), ALL)


def test_pruned_to_differing_counts_before(tmp_path):
    with pytest.raises(InputError, match="num_experts_per_layer.*prune the one it was made from"):
        plan(changed(tmp_path / "source", num_experts_per_layer=[16, 16, 12]), ALL)


def with_tensor(name, tensor):
    return lambda tensors: tensors | {name: tensor}


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


DAMAGES = {
    "axis of another length": (
        with_tensor(f"{LAYERS}1.experts.down_proj_scale", torch.ones(256, 16)),
        [f"tensor {LAYERS}1.experts.down_proj_scale: got shape", "256, 16", "16, .."],
    ),
    "router of another model": (
        lambda tensors: tensors | {f"{LAYERS}2.router.proj.weight": torch.zeros(12, 256, dtype=torch.bfloat16)},
        [f"tensor {LAYERS}2.router.proj.weight: got shape", "12, 256", "16, .."],
    ),
    "packed router": (
        with_tensor(f"{LAYERS}0.router.proj.weight_packed", torch.zeros(256, 2, dtype=torch.int32)),
        [f"tensor {LAYERS}0.router.proj.weight_packed: got shape", "256, 2"],
    ),
    "no per-expert scale": (
        without(f"{LAYERS}0.router.per_expert_scale"),
        ["tensor layers.0.router.per_expert_scale: missing"],
    ),
    "no experts": (
        lambda tensors: {key: tensor for key, tensor in tensors.items() if ".1.experts." not in key},
        ["tensor layers.1.experts.gate_up_proj: missing"],
    ),
    "one expert alone": (
        with_tensor(f"{LAYERS}0.experts.3.up_proj.weight", torch.zeros(2, 2)),
        ["tensor layers.0.experts.0.up_proj: missing, other experts have it"],
    ),
    "too many experts": (
        with_tensor(f"{LAYERS}0.experts.16.up_proj.weight", torch.zeros(2, 2)),
        [f"tensor {LAYERS}0.experts.16.up_proj.weight: the model has experts 0..15"],
    ),
    "too many layers": (
        with_tensor(f"{LAYERS}3.router.per_expert_scale", torch.zeros(16)),
        [f"tensor {LAYERS}3.router.per_expert_scale: the model has layers 0..2"],
    ),
    "experts elsewhere": (
        with_tensor("model.draft.experts.up_proj", torch.zeros(16, 2)),
        ["tensor model.draft.experts.up_proj: got experts outside the decoder layers"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_that_do_not_fit(damage, tmp_path):
    change, words = DAMAGES[damage]
    source = changed(tmp_path / "source", change)
    with pytest.raises(InputError) as caught:
        plan(source, ALL)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_boost_needs_the_norm_of_every_layer_as_floats(tmp_path):
    name = f"{LAYERS}1.post_feedforward_layernorm_1.weight"
    quantized = {"quantization_config": {"quant_method": "quark", "exclude": []}}

    def reopened(folder, change):
        source = changed(folder, change)
        (folder / "config.json").write_text(json.dumps({**source.config, **quantized}))
        return open_checkpoint(folder)

    with pytest.raises(InputError, match="got 2 tensors .*layernorm_1.weight, expected 3"):
        plan(reopened(tmp_path / "missing", without(name)), ALL, Options(shared_boost=1.2))
    int8 = with_tensor(name, torch.ones(256, dtype=torch.int8))
    with pytest.raises(InputError, match=f"tensor {name}: got I8"):
        plan(reopened(tmp_path / "int8", int8), ALL, Options(shared_boost=1.2))
    with pytest.raises(InputError, match=r"tensor .*layernorm_1.weight: NaN or infinite"):
        plan(open_checkpoint(EXAMPLE), ALL, Options(shared_boost=1e39))


@pytest.mark.parametrize(
    "pattern", [r"re:.*layers\.0\.experts\.5\..*", "*.layers.0.experts.5.*", r"re:.*experts\.1[0-9]\."]
)
def test_patterns_that_tell_experts_apart(pattern):
    with pytest.raises(InputError, match="tells experts .* of layer 0 apart"):
        check_pattern(pattern, retained([(0, 5, 11), (0, 1, 2)]))


@pytest.mark.parametrize("pattern", ["re:.*router.*", r"re:.*experts\.\d+\.down_proj", "*vision_tower*", "lm_head"])
def test_patterns_that_do_not(pattern):
    check_pattern(pattern, retained([(0, 5, 11), (0, 1, 2)]))


def test_pattern_that_is_none():
    with pytest.raises(InputError, match="is no regular expression"):
        check_pattern("re:(", retained([(0, 5, 11)]))
