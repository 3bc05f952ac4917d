"""What `restore` does not touch: another model's base, rescaled weights, scales that nobody can bring back."""

import shutil

import pytest
import torch
from damage import change_quantization, load, read_config, store, write_config
from synthetic import small_config, write_checkpoint
from test_restore import planned

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.restore.plan import plan
from vllm_gemma4q.restore.verify import verify

LM = "model.language_model."
UP = f"{LM}layers.0.mlp.up_proj"


@pytest.fixture
def damaged(sound, tmp_path):
    return shutil.copytree(sound / "fp8", tmp_path / "damaged")


def change(folder, change):
    tensors = load(folder)
    change(tensors)
    store(folder, tensors)


def refused(quantized, base):
    with pytest.raises(InputError) as refusal:
        planned(quantized, base)
    message = str(refusal.value)
    assert "\n" not in message
    return message


def test_base_of_another_shape(sound, kind, tmp_path):
    other = write_checkpoint(tmp_path / "other", small_config(moe=kind == "moe", intermediate_size=64))
    message = refused(sound / "fp8", other)
    assert "another model: tensor layers.0.mlp.gate_proj.weight: got [64, 64], expected [96, 64]" in message


def test_base_of_the_other_kind(sound, kind, tmp_path):
    other = write_checkpoint(tmp_path / "other", small_config(moe=kind != "moe"))
    assert "another model: tensor layers.0." in refused(sound / "fp8", other)


def test_base_of_the_same_shape_with_other_weights(sound, kind, tmp_path):
    other = write_checkpoint(tmp_path / "other", small_config(moe=kind == "moe"), seed=1)
    message = refused(sound / "fp8", other)
    assert "away from BASE's, expected at most 25%: BASE is another model" in message


def test_base_that_differs_only_where_nothing_is_quantized(sound, tmp_path):
    """A fine-tune of norms and embeddings: restoring from it would mix two models."""
    base = shutil.copytree(sound / "base", tmp_path / "base")

    def shift(tensors):
        for name, tensor in tensors.items():
            if "norm" in name or "embed" in name or "scalar" in name:
                tensors[name] = tensor + 1

    change(base, shift)
    assert "another model:" in refused(sound / "fp8", base)


def test_quantized_base(sound):
    assert "got a quantized checkpoint, expected the BF16 one as BASE" in refused(sound / "fp8", sound / "int8")


def test_unknown_method(sound, damaged):
    change_quantization(damaged, quant_method="awq")
    assert refused(damaged, sound / "base").startswith("config.json: quant_method is 'awq', expected one of fp8, ")


def test_rescaled_weights(sound, damaged):
    """Scales folded from a norm into the columns of a weight, as SmoothQuant and AWQ do."""

    def rescale(tensors):
        codes = tensors[f"{UP}.weight"].float()
        tensors[f"{UP}.weight"] = (codes * torch.linspace(0.2, 1, codes.shape[1])).to(torch.float8_e4m3fn)

    change(damaged, rescale)
    assert f"tensor {UP}.weight: is " in refused(damaged, sound / "base")


def test_wrong_scale(sound, damaged):
    change(damaged, lambda tensors: tensors[f"{UP}.weight_scale"].mul_(1.5))
    assert f"tensor {UP}.weight: is 50% away" in refused(damaged, sound / "base")


@pytest.mark.parametrize("scale", ["weight_scale", "input_scale"])
def test_missing_scale(sound, damaged, scale):
    change(damaged, lambda tensors: tensors.pop(f"{UP}.{scale}"))
    expected = f"tensor {UP}.weight: got F8_E4M3 without the {scale} that it needs"
    assert refused(damaged, sound / "base") == expected


def test_fused_shards_quantized_in_part(sound, damaged):
    original = load(sound / "base")

    def unquantize(tensors):
        tensors[f"{UP}.weight"] = original[f"{UP}.weight"]

    change(damaged, unquantize)
    message = refused(damaged, sound / "base")
    assert message.startswith("layers.0.mlp.up_proj: got unquantized weights, expected quantized ones like those of ")


def test_quantized_linear_of_another_shape(sound, damaged):
    change(damaged, lambda tensors: tensors.update({f"{UP}.weight": tensors[f"{UP}.weight"][:-1]}))
    assert f"tensor {UP}.weight: layers.0.mlp.up_proj: got [95, 64], BASE has (96, 64)" == refused(
        damaged, sound / "base"
    )


def test_experts_quantized_in_part(sound, damaged, kind):
    if kind == "dense":
        change(damaged, lambda tensors: tensors.pop(f"{UP}.weight"))
        assert "up_proj: got unquantized weights" in refused(damaged, sound / "base")
        return
    name = f"{LM}layers.0.experts.1.up_proj.weight"
    tensors = load(damaged)
    store(damaged, {key: tensor for key, tensor in tensors.items() if key != name})
    assert "layers.0.experts.1.up_proj.weight: missing" in refused(damaged, sound / "base")
    store(damaged, {**tensors, name: tensors[name].bfloat16()})
    assert f"tensor {name}: got BF16, expected F8_E4M3" in refused(damaged, sound / "base")


def test_one_tensor_under_two_roots(sound, damaged):
    change(damaged, lambda tensors: tensors.update({"model.norm.weight": tensors[f"{LM}norm.weight"].clone()}))
    assert "also stored as model." in refused(damaged, sound / "base")


def test_two_models_configs(sound, damaged):
    config = read_config(damaged)
    config["text_config"]["num_hidden_layers"] = 2
    config["text_config"]["layer_types"] = config["text_config"]["layer_types"][:2]
    write_config(damaged, config)
    assert "another model: tensor layers.2." in refused(damaged, sound / "base")


def test_verification_reads_what_was_written(sound, damaged):
    """A sound result passes; a flipped bit, a missing scale, an orphan and a quantized tower do not."""
    name = "model.embed_vision.embedding_projection.weight"
    change(damaged, lambda tensors: tensors.update({name: tensors[name] + 1}))
    restoration = plan(open_checkpoint(damaged), open_checkpoint(sound / "base"))
    assert list(restoration.restored) == [name]
    good = load(sound / "fp8")

    def verified(**changes):
        store(damaged, {key: tensor for key, tensor in {**good, **changes}.items() if tensor is not None})
        verify(restoration, sorted(damaged.glob("*.safetensors")))

    verified()
    flipped = good[name].clone()
    flipped.view(torch.uint8)[-1, -1] ^= 1
    tower = "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear"
    wrong = {
        "written otherwise": {name: flipped},
        "without the weight_scale": {f"{UP}.weight_scale": None},
        "is not quantized": {f"{tower}.weight_scale": torch.tensor(1.0)},
        "which it never is": {
            f"{tower}.weight": good[f"{tower}.weight"].to(torch.float8_e4m3fn),
            f"{tower}.weight_scale": torch.tensor(1.0),
            f"{tower}.input_scale": torch.tensor(1.0),
        },
    }
    for message, changes in wrong.items():
        with pytest.raises(InputError, match=message):
            verified(**changes)
