"""Other scale rules, layouts, dtypes and weights; what the FP8 quantizer refuses."""

import json
import sys

import numpy as np
import pytest
import torch
from fp8_runs import DOWN, E4M3, K, Q, aligned_scales, load, manifest, run, same, weights_before
from made_statistics import write_for
from safetensors.torch import save_file
from synthetic import add_left_over, small_config, write_checkpoint

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.fp8_static.format import Granularity
from vllm_gemma4q.fp8_static.inputs import ONLY_ZEROS
from vllm_gemma4q.fp8_static.quantize import Options, bytes_to_measure, plan
from vllm_gemma4q.fp8_static.scales import NEUTRAL_SCALE, Rule


@pytest.mark.parametrize("rule", [Rule.PERCENTILE, Rule.MSE])
def test_other_rules_count_what_they_clip(tmp_path, rule):
    source = write_checkpoint(tmp_path / "source", small_config(intermediate_size=256))
    tensors = load(source)
    tensors[f"{DOWN}.weight"][0, 0] = 1.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    def with_outlier(module, values):
        values = [np.tile(values[0], (4, 1))]
        if module == DOWN:
            values[0][0, 0] = 1000
        return values

    write_for(source, tmp_path / "statistics", change=with_outlier)
    after = run(source, tmp_path / "statistics", tmp_path / "target", Options(rule, rule))
    details = manifest(tmp_path / "target")["details"]
    assert (details["rules"]["weights"], details["rules"]["activations"]) == (rule.value, rule.value)
    for module, row in details["linears"].items():
        limit = 448 * after[f"{module}.weight_scale"].item() * (1 + 2**-20)
        assert row["weight_clipped"] == int((tensors[f"{module}.weight"].double().abs() > limit).sum())
    assert sum(row["weight_clipped"] for row in details["linears"].values()) == details["clipped"]
    if rule is Rule.PERCENTILE:
        assert details["linears"][DOWN]["weight_clipped"] == 1
        assert 0 < details["linears"][DOWN]["input_saturated"] <= 1e-4


def test_per_channel_weights(tmp_path):
    source = write_checkpoint(tmp_path / "source", small_config())
    tensors = load(source)
    tensors[f"{DOWN}.weight"][3] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    write_for(source, tmp_path / "statistics")
    options = Options(granularity=Granularity.CHANNEL)
    assert bytes_to_measure(open_checkpoint(source), options) == 0
    after = run(source, tmp_path / "statistics", tmp_path / "target", options)
    for module, weight in weights_before(tensors).items():
        scale = (weight.float().abs().amax(dim=1, keepdim=True) / 448).clamp_min(2.0**-126)
        assert torch.equal(after[f"{module}.weight_scale"], scale)
        expected = (weight.float() / scale).clamp(-448, 448).to(E4M3)
        assert same(after[f"{module}.weight"], expected)
        assert after[f"{module}.input_scale"].shape == ()
    quantization = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    from compressed_tensors.quantization import QuantizationConfig

    parsed = QuantizationConfig.model_validate(quantization)
    group = parsed.config_groups["group_0"]
    assert (group.weights.strategy, group.input_activations.strategy) == ("channel", "tensor")
    assert not group.input_activations.dynamic
    assert "lm_head" in parsed.ignore


def test_per_channel_experts_are_refused(tmp_path):
    source = write_checkpoint(tmp_path / "source", small_config(moe=True))
    write_for(source, tmp_path / "statistics")
    with pytest.raises(InputError, match="experts with static inputs per tensor only"):
        plan(open_checkpoint(source), tmp_path / "statistics", Options(granularity=Granularity.CHANNEL))


def test_per_channel_has_one_rule():
    with pytest.raises(InputError, match="got scale rule mse, expected absmax"):
        Options(weights=Rule.MSE, granularity=Granularity.CHANNEL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_float_dtypes(tmp_path, dtype):
    source = write_checkpoint(tmp_path / "source", small_config(), dtype=dtype)
    write_for(source, tmp_path / "statistics")
    weights, after = weights_before(load(source)), run(source, tmp_path / "statistics", tmp_path / "target")
    for module, scale in aligned_scales(weights).items():
        assert after[f"{module}.weight_scale"].item() == scale
        expected = (weights[module].float() / torch.tensor(scale)).clamp(-448, 448).to(E4M3)
        assert same(after[f"{module}.weight"], expected)


def test_experts_that_come_one_by_one(tmp_path):
    source = write_checkpoint(tmp_path / "source", small_config(moe=True))
    write_for(source, tmp_path / "statistics", unreached=(2,))
    fused = run(source, tmp_path / "statistics", tmp_path / "fused")
    tensors = load(source)
    split = {f"{module}.weight": weight.contiguous() for module, weight in weights_before(tensors).items()}
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith((".gate_up_proj", ".down_proj"))}
    other = write_checkpoint(tmp_path / "split", small_config(moe=True))
    save_file({**rest, **split}, other / "model.safetensors", metadata={"format": "pt"})
    write_for(other, tmp_path / "split-statistics", unreached=(2,))
    result = run(other, tmp_path / "split-statistics", tmp_path / "split-target")
    assert set(result) == set(fused)
    assert all(same(result[name], fused[name]) for name in result)


def test_blocks_do_not_decide_bytes(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "source", small_config(moe=True))
    write_for(source, tmp_path / "statistics")
    whole = run(source, tmp_path / "statistics", tmp_path / "whole")
    monkeypatch.setattr("vllm_gemma4q.fp8_static.measure._BLOCK_BYTES", 1000)
    # The package exports a function of the module's name.
    monkeypatch.setattr(sys.modules["vllm_gemma4q.checkpoint.rewrite"], "BLOCK_BYTES", 1000)
    seen = []
    blocks = run(source, tmp_path / "statistics", tmp_path / "blocks", progress=seen.append, max_shard_bytes=50_000)
    assert set(whole) == set(blocks)
    assert all(same(whole[name], blocks[name]) for name in whole)
    assert sum(seen) == bytes_to_measure(open_checkpoint(source), Options())
    assert max(seen) <= 1000


def test_zeros_take_their_siblings_scale(tmp_path):
    source = write_checkpoint(tmp_path / "source", small_config())
    tensors = load(source)
    for module in (K, DOWN):
        tensors[f"{module}.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    write_for(source, tmp_path / "statistics", change=lambda m, v: [v[0] * 0] if m == DOWN else v)
    after = run(source, tmp_path / "statistics", tmp_path / "target")
    assert after[f"{K}.weight_scale"].item() >= after[f"{Q}.weight_scale"].item()
    assert after[f"{DOWN}.weight_scale"].item() == after[f"{DOWN}.input_scale"].item() == NEUTRAL_SCALE
    assert not after[f"{DOWN}.weight"].float().any()
    assert manifest(tmp_path / "target")["details"]["fallbacks"] == {ONLY_ZEROS: [DOWN]}


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, granularity, bad):
    source = write_checkpoint(tmp_path / "source", small_config())
    tensors = load(source)
    tensors[f"{DOWN}.weight"][7, 7] = bad
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    write_for(source, tmp_path / "statistics")
    with pytest.raises(InputError, match=f"{DOWN}.*got NaN or infinity"):
        run(source, tmp_path / "statistics", tmp_path / "target", Options(granularity=granularity))
    assert not (tmp_path / "target").exists()


def test_statistics_of_another_model_are_refused(tmp_path):
    source = write_checkpoint(tmp_path / "source", small_config())
    write_for(source, tmp_path / "statistics")
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    deeper = write_checkpoint(tmp_path / "deeper", small_config(num_hidden_layers=4, layer_types=kinds))
    with pytest.raises(InputError, match=r"statistics of another model: nothing for .*layers\.3"):
        plan(open_checkpoint(deeper), tmp_path / "statistics")
    wider = write_checkpoint(tmp_path / "wider", small_config(intermediate_size=128))
    with pytest.raises(InputError, match=r"mlp\.down_proj: got 96 channels, expected 128"):
        plan(open_checkpoint(wider), tmp_path / "statistics")
    moe = write_checkpoint(tmp_path / "moe", small_config(moe=True))
    write_for(moe, tmp_path / "moe-statistics")
    more = write_checkpoint(tmp_path / "more", small_config(moe=True, num_experts=6))
    with pytest.raises(InputError, match="got 4 experts, expected more than 4"):
        plan(open_checkpoint(more), tmp_path / "moe-statistics")


def test_layers_that_no_token_reached_are_refused(tmp_path):
    source = write_checkpoint(tmp_path / "source", small_config(moe=True))
    write_for(source, tmp_path / "statistics", unreached=(0, 1, 2, 3))
    with pytest.raises(InputError, match="no token reached it; calibrate with more text"):
        plan(open_checkpoint(source), tmp_path / "statistics")


def test_per_layer_inputs_stay_as_they_are(tmp_path):
    config = small_config(hidden_size_per_layer_input=16, vocab_size_per_layer_input=256)
    source = write_checkpoint(tmp_path / "source", config)
    write_for(source, tmp_path / "statistics")
    before, after = load(source), run(source, tmp_path / "statistics", tmp_path / "target")
    name = "model.language_model.layers.0.per_layer_input_gate"
    assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    ignored = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]["ignored_layers"]
    assert {name, "model.language_model.per_layer_model_projection"} <= set(ignored)


def test_a_finished_run_is_left_alone_and_another_rule_is_another_run(tmp_path):
    source = write_checkpoint(tmp_path / "source", small_config())
    write_for(source, tmp_path / "statistics")
    conversion = plan(open_checkpoint(source), tmp_path / "statistics")
    assert convert(conversion, tmp_path / "target", ["test"], lambda _: None)
    assert not convert(conversion, tmp_path / "target", ["test"], lambda _: None)
    other = plan(open_checkpoint(source), tmp_path / "statistics", Options(weights=Rule.MSE))
    with pytest.raises(InputError, match="not empty"):
        convert(other, tmp_path / "target", ["test"], lambda _: None)


def test_statistics_of_another_fine_tune(tmp_path):
    """The same names and shapes: its activations would decide scales without a word."""
    source = write_checkpoint(tmp_path / "source", small_config())
    tuned = write_checkpoint(tmp_path / "tuned", small_config(), seed=1)
    write_for(source, tmp_path / "statistics")
    with pytest.raises(InputError, match=r"statistics: statistics of another model: source \(\w+\), expected tuned \("):
        plan(open_checkpoint(tuned), tmp_path / "statistics")


def test_only_linears_that_the_model_has_are_quantized(tmp_path):
    """And what engines fuse with them, which calibration has not seen: its input is that of its siblings."""
    source = write_checkpoint(tmp_path / "source", small_config())
    modules = add_left_over(source)
    write_for(source, tmp_path / "statistics")
    before, after = load(source), run(source, tmp_path / "statistics", tmp_path / "target")
    shard = modules["shard"]
    assert after[f"{shard}.weight"].dtype == E4M3
    assert torch.equal(after[f"{shard}.input_scale"], after[f"{shard.replace('v_proj', 'q_proj')}.input_scale"])
    ignored = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]["ignored_layers"]
    for kind in ("adapter", "layer"):
        name = f"{modules[kind]}.weight"
        assert torch.equal(after[name], before[name]) and f"{name}_scale" not in after
        assert modules[kind] in ignored
