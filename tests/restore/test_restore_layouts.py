"""How others store the same: AutoFP8's names, fused and split experts, packed weights, int8 compressed-tensors."""

import shutil

import pytest
import torch
from damage import (
    change_quantization,
    load,
    quantize_towers,
    read_config,
    same,
    store,
    to_fp8,
    to_int8,
    write_config,
)
from synthetic import small_config, write_checkpoint
from test_restore import planned, restore

from vllm_gemma4q.restore.formats import parse_format

LM = "model.language_model."
EXPERTS = f"{LM}layers.0.experts"


@pytest.fixture
def fp8(sound, tmp_path):
    return shutil.copytree(sound / "fp8", tmp_path / "damaged")


def test_early_autofp8(sound, fp8, tmp_path):
    """`act_scale`, scalars of one element, and transformers' name for the list."""
    tensors = {
        name.replace("input_scale", "act_scale"): tensor.reshape(1) if tensor.dim() == 0 else tensor
        for name, tensor in load(fp8).items()
    }
    quantize_towers(tensors, scales=("act_scale",))
    store(fp8, tensors)
    change_quantization(fp8, without=("ignored_layers",), modules_to_not_convert=["lm_head", "re:.*vision_tower.*"])
    restoration = restore(fp8, sound / "base", tmp_path / "target")
    scale = f"{LM}layers.0.mlp.up_proj.act_scale"
    assert restoration.renamed[scale] == scale.replace("act_scale", "input_scale")
    got, expected = load(tmp_path / "target"), load(sound / "fp8")
    assert set(got) == set(expected)
    assert all(same(got[name].reshape(-1), expected[name].reshape(-1)) for name in got)
    quantization = read_config(tmp_path / "target")["quantization_config"]
    assert "ignored_layers" not in quantization
    expected = read_config(sound / "fp8")["quantization_config"]["ignored_layers"]
    assert quantization["modules_to_not_convert"] == expected


def test_input_scales_go_where_inputs_are_scaled_while_serving(sound, fp8, tmp_path):
    change_quantization(fp8, activation_scheme="dynamic")
    restoration = restore(fp8, sound / "base", tmp_path / "target")
    scales = {name for name in load(fp8) if name.endswith(".input_scale")}
    assert set(restoration.dropped) == scales
    assert len(scales) >= 3 * 6
    assert set(load(tmp_path / "target")) == set(load(fp8)) - scales


def split_experts(tensors):
    """Fused BF16 experts one by one."""
    result = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, rows in enumerate(tensor):
                gate, up = rows.chunk(2)
                result |= {f"{prefix}.{expert}.gate_proj.weight": gate, f"{prefix}.{expert}.up_proj.weight": up}
        elif last == "down_proj":
            result |= {f"{prefix}.{expert}.down_proj.weight": rows for expert, rows in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


@pytest.fixture
def moe(tmp_path):
    """BF16 base with fused experts."""
    return write_checkpoint(tmp_path / "base", small_config(moe=True))


def say_dynamic_fp8(folder):
    """A config that asks for nothing but a weight_scale."""
    config = read_config(folder)
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "ignored_layers": ["lm_head"],
    }
    write_config(folder, config)


def quantize_linears(tensors, to):
    """Attention and MLP in place, scales by module."""
    for name in [name for name in tensors if ("self_attn" in name or ".mlp." in name) and name.startswith(LM)]:
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            tensors[name], tensors[f"{module}.weight_scale"] = to(tensors[name])


@pytest.mark.parametrize("is_base_split", [False, True], ids=["fused base", "split base"])
def test_experts_left_in_bf16_one_by_one(moe, tmp_path, is_base_split):
    """They equal the base's in another layout: the base's layout is written, and nothing is called different."""
    tensors = load(moe)
    quantized = write_checkpoint(tmp_path / "quantized", small_config(moe=True))
    changed = tensors if is_base_split else split_experts(tensors)
    if is_base_split:
        store(moe, split_experts(tensors))
    expected = load(moe)
    changed = dict(changed)
    quantize_linears(changed, to_fp8)
    store(quantized, changed)
    say_dynamic_fp8(quantized)
    restoration = restore(quantized, moe, tmp_path / "target")
    assert set(restoration.restored.values()) == {"stored another way"}
    got = load(tmp_path / "target")
    experts = [name for name in expected if ".experts." in name]
    assert all(same(got[name], expected[name]) for name in experts)
    assert {name for name in got if ".experts." in name} == set(experts)
    listed = read_config(tmp_path / "target")["quantization_config"]["ignored_layers"]
    assert {f"{LM}layers.{layer}.experts" for layer in range(3)} <= set(listed)


@pytest.mark.parametrize("joint", [".weight_scale", "_weight_scale", "_scale"])
@pytest.mark.parametrize("is_base_split", [False, True], ids=["fused base", "split base"])
def test_fused_quantized_experts_are_kept(moe, tmp_path, joint, is_base_split):
    quantized = write_checkpoint(tmp_path / "quantized", small_config(moe=True))
    tensors = load(quantized)
    quantize_linears(tensors, to_int8)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        tensors[name], tensors[name + joint] = to_int8(tensors[name])
    kept = dict(tensors)
    quantize_towers(tensors, to_int8, scales=())
    store(quantized, tensors)
    say_dynamic_fp8(quantized)
    if is_base_split:
        store(moe, split_experts(load(moe)))
    restoration = restore(quantized, moe, tmp_path / "target")
    assert set(restoration.restored.values()) == {"quantized"}
    got = load(tmp_path / "target")
    assert set(got) == set(kept)
    assert all(same(got[name], kept[name]) for name in kept)


def test_int8_compressed_tensors(sound, kind, tmp_path):
    """int-quantized, one scale a row: the same tensors as Quark's under another config."""
    quantized = shutil.copytree(sound / "int8", tmp_path / "damaged")
    tensors = load(quantized)
    names = quantize_towers(tensors, to_int8, scales=())
    store(quantized, tensors)
    config = read_config(quantized)
    arguments = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "channel"}
    group = {
        "targets": ["Linear"],
        "weights": arguments,
        "input_activations": {**arguments, "dynamic": True, "strategy": "token"},
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    write_config(quantized, config)
    restoration = restore(quantized, sound / "base", tmp_path / "target")
    assert restoration.restored == dict.fromkeys(names, "quantized")
    got, expected = load(tmp_path / "target"), load(sound / "int8")
    assert set(got) == set(expected)
    assert all(same(got[name], expected[name]) for name in got)
    ignored = read_config(tmp_path / "target")["quantization_config"]["ignore"]
    assert ignored == read_config(sound / "int8")["quantization_config"]["exclude"]


def test_packed_weights(sound, kind, tmp_path):
    """compressed-tensors' 4 bits in int32: kept as they are in the language model, replaced in the tower."""
    quantized = shutil.copytree(sound / "base", tmp_path / "damaged")
    tensors = load(quantized)
    linears = [name for name in tensors if name.endswith("_proj.weight") and "router" not in name] + [
        name for name in tensors if name.endswith("_proj.linear.weight")
    ]
    for name in linears:
        rows, columns = tensors.pop(name).shape
        tensors |= {
            f"{name}_packed": torch.arange(rows * columns // 8, dtype=torch.int32).view(rows, columns // 8),
            f"{name}_scale": torch.ones(rows, columns // 16, dtype=torch.bfloat16),
            f"{name}_shape": torch.tensor([rows, columns]),
        }
    store(quantized, tensors)
    config = read_config(quantized)
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}, "input_activations": None}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": [],
    }
    write_config(quantized, config)
    restoration = restore(quantized, sound / "base", tmp_path / "target")
    in_tower = [name for name in linears if "vision_tower" in name]
    assert dict.fromkeys(in_tower, "missing").items() <= restoration.restored.items()
    got, base = load(tmp_path / "target"), load(sound / "base")
    for name in linears:
        if name in in_tower:
            assert same(got[name], base[name])
            assert f"{name}_packed" in restoration.dropped
            assert f"{name}_shape" in restoration.dropped
        else:
            assert all(same(got[name + part], tensors[name + part]) for part in ("_packed", "_scale", "_shape"))


def test_blocks_ask_for_their_own_scale():
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    form = parse_format({"quantization_config": quantization})
    weight = "layers.0.mlp.up_proj.weight"
    assert form.missing(weight, {f"{weight}_scale_inv": 1}) is None
    assert form.missing(weight, {f"{weight}_scale": 1}) == "weight_scale_inv"


def test_a_text_only_checkpoint_needs_no_tower(sound, kind, tmp_path):
    """Gemma4ForCausalLM: the language model at `model.`, the base multimodal."""
    quantized = shutil.copytree(sound / "fp8", tmp_path / "damaged")
    tensors = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in load(quantized).items()
        if "vision" not in name
    }
    norm = "model.layers.0.input_layernorm.weight"
    original = tensors[norm]
    tensors[norm], tensors[f"{norm}_scale"] = to_int8(original)
    store(quantized, tensors)
    config = read_config(quantized)
    text = {**config["text_config"], "architectures": ["Gemma4ForCausalLM"]}
    text["quantization_config"] = config["quantization_config"]
    write_config(quantized, text)
    restoration = restore(quantized, sound / "base", tmp_path / "target")
    assert restoration.restored == {norm: "quantized"}
    got = load(tmp_path / "target")
    assert set(got) == {*tensors} - {f"{norm}_scale"}
    assert same(got[norm], original)
    listed = read_config(tmp_path / "target")["quantization_config"]["ignored_layers"]
    assert not [name for name in listed if "vision" in name or "language_model" in name]
    assert planned(tmp_path / "target", sound / "base").is_needed is False


def test_base_in_another_order(sound, fp8, tmp_path):
    tensors = load(fp8)
    quantize_towers(tensors)
    store(fp8, tensors)
    base = shutil.copytree(sound / "base", tmp_path / "base")
    store(base, dict(reversed(load(base).items())))
    restore(fp8, base, tmp_path / "target")
    got, expected = load(tmp_path / "target"), load(sound / "fp8")
    assert all(same(got[name], expected[name]) for name in expected)
