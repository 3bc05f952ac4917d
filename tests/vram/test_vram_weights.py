"""Bytes of weights: what files hold, what is planned, and what each rank of vLLM gets."""

import math

import pytest
import torch
from gemma4q_kernels.exl3.slicing import cut
from gemma4q_kernels.exl3_layout import Span
from synthetic import CONFIG_26B_A4B, CONFIG_31B, shapes, small_config, write_checkpoint, write_header_only

from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.quark_int8.quantize import plan
from vllm_gemma4q.vram.planned import VISION_WIDTH, Scheme, planned_tensors
from vllm_gemma4q.vram.source import open_source, plan_source
from vllm_gemma4q.vram.weights import Part, StoredTensor, stored_bytes, vllm_bytes

CONFIGS = {"31B": CONFIG_31B, "26B-A4B": CONFIG_26B_A4B}
STD_BYTES = 2 * 2 * VISION_WIDTH  # of the published vision tower, which the synthetic one lacks


def with_window(config):
    return {**config, "text_config": {**config["text_config"], "sliding_window": 1024}}


def parts(model, scheme, ranks=1, bits=0, head_bits=0):
    source = plan_source(model, scheme, bits, head_bits)
    assert source.architecture is not None
    return vllm_bytes(source.architecture, source.tensors, ranks)


@pytest.mark.parametrize("model", CONFIGS)
def test_planned_bf16_is_what_a_checkpoint_holds(model, tmp_path):
    config = with_window(CONFIGS[model])
    found = open_source(write_header_only(tmp_path / "model", config, shapes(config).items()))
    planned = plan_source(model, Scheme.BF16)
    expected = stored_bytes(planned.tensors)
    expected[Part.VISION] -= STD_BYTES
    assert stored_bytes(found.tensors) == expected
    assert found.cache == planned.cache


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_planned_int8_is_what_quantize_writes(moe, tmp_path):
    config = small_config(moe)
    source = open_checkpoint(write_checkpoint(tmp_path / "model", config))
    written = {output.name: (output.shape, output.n_bytes) for step in plan(source).steps for output in step.outputs}
    planned = {
        tensor.name: (tensor.shape, tensor.n_bytes)
        for tensor in planned_tensors(parse_text_architecture(config), Scheme.QUARK_INT8, 0, 0)
        if "vision" not in tensor.name
    }
    assert planned == {name: found for name, found in written.items() if "vision" not in name}


def test_vllm_loads_k_twice_where_v_is_k():
    """31B: 10 global layers, 4 key heads of 512, 5376 inputs; EXL3 is packed and held once."""
    stored = stored_bytes(plan_source("31B", Scheme.BF16).tensors)
    assert parts("31B", Scheme.BF16)[Part.BODY] - stored[Part.BODY] == 10 * 4 * 512 * 5376 * 2
    stored = stored_bytes(plan_source("31B", Scheme.EXL3, 4, 6).tensors)
    assert parts("31B", Scheme.EXL3, 1, 4, 6) == stored


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_31b_on_ranks(ranks):
    """Key heads are 16 in sliding layers and 4 in global ones, which the other ranks repeat."""
    one, each = parts("31B", Scheme.BF16), parts("31B", Scheme.BF16, ranks)
    hidden, inner = 5376, 21504
    mlp = 60 * 3 * hidden * inner / ranks
    sliding = 50 * hidden * 256 * (2 * 32 + 2 * 16) / ranks
    full = 10 * hidden * 512 * (2 * 32 / ranks + 2 * max(1, 4 / ranks))
    assert each[Part.BODY] == 2 * (mlp + sliding + full)
    assert each[Part.EMBEDDING] == one[Part.EMBEDDING] / ranks
    assert each[Part.VISION] == one[Part.VISION]
    assert each[Part.OTHER] == one[Part.OTHER]


def test_scales_go_with_what_they_scale():
    """INT8 over two ranks: scales of q, k, v, gate and up are split, those of o and down are on both."""
    architecture = parse_text_architecture(small_config())
    tensors = {tensor.name: tensor for tensor in planned_tensors(architecture, Scheme.QUARK_INT8, 0, 0)}
    layer = "model.language_model.layers.0."
    halves = {
        "self_attn.q_proj": 2,
        "self_attn.k_proj": 2,
        "mlp.gate_proj": 2,
        "self_attn.o_proj": 1,
        "mlp.down_proj": 1,
    }
    for linear, shares in halves.items():
        scale = tensors[f"{layer}{linear}.weight_scale"]
        assert vllm_bytes(architecture, [scale], 2)[Part.BODY] == scale.n_bytes // shares
        weight = tensors[f"{layer}{linear}.weight"]
        assert vllm_bytes(architecture, [weight], 2)[Part.BODY] == weight.n_bytes // 2


@pytest.fixture(scope="module")
def exl3_26b():
    return plan_source("26B-A4B", Scheme.EXL3, 4, 6)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("linear", "out_features", "in_features", "by_output"),
    [
        ("experts.5.gate_proj", 704, 2816, True),
        ("experts.5.down_proj", 2816, 704, False),
        ("mlp.up_proj", 2112, 2816, True),
        ("mlp.down_proj", 2816, 2112, False),
    ],
)
def test_exl3_gives_ranks_every_block_they_touch(exl3_26b, linear, out_features, in_features, by_output, ranks):
    """The bytes of what the plugin cuts from the file for the rank that gets most, by its own cutting."""
    source = exl3_26b
    prefix = f"model.layers.0.{linear}."
    stored = {tensor.name.removeprefix(prefix): tensor for tensor in source.tensors if tensor.name.startswith(prefix)}
    out, into = Span(0, out_features), Span(0, in_features)
    full = {
        "trellis": torch.empty(into.covered // 16, out.covered // 16, 64, dtype=torch.int16, device="meta"),
        "suh": torch.empty(into.covered, dtype=torch.float16, device="meta"),
        "svh": torch.empty(out.covered, dtype=torch.float16, device="meta"),
    }
    for name, tensor in full.items():
        assert stored[name].n_bytes == tensor.numel() * 2
        cuts = []
        for rank in range(ranks):
            local = (out_features if by_output else in_features) // ranks
            span = Span(rank * local, local)
            cuts.append(cut(name, tensor, into if by_output else span, span if by_output else out).numel() * 2)
        assert vllm_bytes(source.architecture, [stored[name]], ranks)[Part.BODY] == max(cuts)


def test_pruned_layers_count_what_they_keep(tmp_path):
    config = small_config(moe=True, num_experts=4, num_experts_per_layer=[2, 4, 3])
    folder = write_checkpoint(tmp_path / "pruned", with_window(config))
    found = stored_bytes(open_source(folder).tensors)
    kept = stored_bytes(open_source(write_checkpoint(tmp_path / "whole", with_window(small_config(moe=True)))).tensors)
    expert = 3 * 32 * 64 * 2
    assert kept[Part.BODY] - found[Part.BODY] == 3 * expert
    assert sum(found.values()) == sum(2 * math.prod(shape) for shape in shapes(with_window(config)).values())


@pytest.mark.parametrize(
    ("model", "ranks", "message"),
    [
        ("31B", 3, r"^-tp 3: layer 0 has 16 key heads, expected a multiple or a divisor of 3$"),
        ("31B", 64, r"^-tp 64: num_attention_heads = 32 does not divide among 64 ranks$"),
    ],
)
def test_what_does_not_divide(model, ranks, message):
    with pytest.raises(InputError, match=message):
        parts(model, Scheme.BF16, ranks)


def test_a_tensor_outside_linears_is_on_every_rank():
    architecture = parse_text_architecture(small_config())
    for name in ("model.language_model.layers.1.router.proj.weight", "model.language_model.norm.weight", "odd"):
        assert vllm_bytes(architecture, [StoredTensor(name, (8,), 16)], 2) == {Part.OTHER: 16}


def test_a_layer_that_the_configuration_has_not():
    tensor = StoredTensor("model.language_model.layers.7.mlp.up_proj.weight", (96, 64), 2 * 96 * 64)
    with pytest.raises(InputError, match=r"7.mlp.up_proj.weight: got layer 7, expected 0..2, as config.json says"):
        vllm_bytes(parse_text_architecture(small_config(False)), [tensor], 1)
