"""The file-to-file FP8 quantizer: what it writes, against the rule spelled out; what it leaves, what it refuses."""

import json
import struct

import numpy as np
import pytest
import torch
from fp8_runs import E4M3, FUSED, aligned_scales, fused_name, load, manifest, run, same, weights_before
from made_statistics import write_for
from safetensors import safe_open
from synthetic import small_config, write_checkpoint

from vllm_gemma4q.architecture import Role, role_of
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.fp8_static.inputs import UNREACHED
from vllm_gemma4q.fp8_static.quantize import plan


@pytest.fixture(scope="module", params=["dense", "moe"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder / "source", small_config(moe=request.param == "moe"), shards=2)
    inputs = write_for(folder / "source", folder / "statistics.safetensors", unreached=(1,))
    after = run(folder / "source", folder / "statistics.safetensors", folder / "target")
    return load(folder / "source"), after, folder, inputs


def test_weights_and_their_scales(pair):
    before, after, _, _ = pair
    weights = weights_before(before)
    assert len(weights) >= 3 * 6
    for module, scale in aligned_scales(weights).items():
        codes, written = after[f"{module}.weight"], after[f"{module}.weight_scale"]
        assert (codes.dtype, written.dtype, tuple(written.shape)) == (E4M3, torch.float32, ())
        assert written.item() == scale
        expected = (weights[module].float() / torch.tensor(scale)).clamp(-448, 448).to(E4M3)
        assert same(codes, expected)


def test_input_scales(pair):
    before, after, _, inputs = pair
    for module in weights_before(before):
        name, _ = fused_name(module)
        written = after[f"{module}.input_scale"]
        assert (written.dtype, tuple(written.shape)) == (torch.float32, ())
        assert written.item() == np.float32(float(inputs[name].absmax.max()) / 448)


def test_shards_of_one_input_share_its_scale(pair):
    after = pair[1]
    for name in after:
        for shards in FUSED:
            if name.endswith(f".{shards[0]}.input_scale"):
                siblings = [name.replace(shards[0], shard) for shard in shards]
                assert len({after[sibling].item() for sibling in siblings if sibling in after}) == 1


def test_unreached_experts_are_reported(pair):
    folder = pair[2]
    reported = manifest(folder / "target")["details"]["fallbacks"]
    if not any("experts" in name for name in pair[1]):
        assert reported == {}
        return
    assert list(reported) == [UNREACHED]
    layers = sorted({name.partition(".experts.")[0] for name in pair[1] if ".experts." in name})
    assert sorted(reported[UNREACHED]) == sorted(
        f"{layer}.experts.1.{linear}" for layer in layers for linear in ("gate_proj", "up_proj", "down_proj")
    )


def test_everything_else_is_copied_bit_for_bit(pair):
    before, after, _, _ = pair
    modules = set(weights_before(before))
    written = {f"{module}.{part}" for module in modules for part in ("weight", "weight_scale", "input_scale")}
    kept = set(after) - written
    for name in kept:
        assert same(after[name], before[name])
    untouched = (Role.ROUTER, Role.EMBEDDING, Role.NORM, Role.VISION, Role.EMBED_VISION)
    assert {name for name in before if role_of(name) in untouched} == kept


def test_configuration_is_what_engines_read(pair):
    before, after, folder, _ = pair
    config = json.loads((folder / "target" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((folder / "source" / "config.json").read_text())
    ignored = quantization.pop("ignored_layers")
    assert quantization == {"quant_method": "fp8", "activation_scheme": "static"}
    assert not [name for name in ignored if "*" in name or name.startswith("re:")]
    assert {f"{name}.weight" for name in ignored} - set(before) == {"lm_head.weight"}
    assert not [name for name in ignored if f"{name}.weight_scale" in after]
    assert {"model.vision_tower.encoder.layers.0.self_attn.q_proj.linear", "lm_head"} <= set(ignored)
    assert "model.embed_vision.embedding_projection" in ignored
    assert ("model.language_model.layers.0.router.proj" in ignored) == ("num_experts" in config["text_config"])


def test_manifest_tells_scales_and_what_they_cost(pair):
    before, after, folder, _ = pair
    details = manifest(folder / "target")["details"]
    assert details["rules"] == {"activations": "absmax", "weights": "absmax", "granularity": "per-tensor"}
    assert details["clipped"] == 0
    weights, underflowed = weights_before(before), 0
    for module, row in details["linears"].items():
        assert struct.pack("<f", row["weight_scale"]) == struct.pack("<f", after[f"{module}.weight_scale"].item())
        assert row["input_scale"] == after[f"{module}.input_scale"].item()
        assert row["weight_absmax"] == float(weights[module].abs().max())
        zeros = (after[f"{module}.weight"].float() == 0) & (weights[module] != 0)
        assert row["weight_underflowed"] == int(zeros.sum())
        assert (row["weight_clipped"], row["input_saturated"]) == (0, 0)
        underflowed += row["weight_underflowed"]
    assert set(details["linears"]) == set(weights)
    assert details["underflowed"] == underflowed


def test_already_quantized_is_refused(pair):
    with pytest.raises(InputError, match="already quantized"):
        plan(open_checkpoint(pair[2] / "target"), pair[2] / "statistics.safetensors")


def test_headers_are_those_of_the_format(pair):
    for path in (pair[2] / "target").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name.endswith((".weight_scale", ".input_scale")):
                    assert (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) == ("F32", [])
