"""The recipe of benchmarks/gemma3_270m.py on small data: the dither's steps, and that padding changes no prediction."""

import sys

import numpy as np
import pytest
import tolerances
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, dequantize, get_tensor_name_map
from small_models import ROOT
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

sys.path.insert(0, str(ROOT / "benchmarks"))

from dither import dither, steps
from gemma3_270m import PADDED_WIDTH, WIDTH, padded

T = GGMLQuantizationType
# Bytes of a block, where its float16 scales are, weights that share a step.
LAYOUTS = {T.Q8_0: (34, [0], 32), T.Q5_0: (22, [0], 32), T.Q4_K: (144, [0, 2], 32), T.Q6_K: (210, [208], 16)}
LAYERS = 2


def random_rows(qtype, n_blocks=64):
    """Blocks of random codes and sub-block scales, with scales of both signs, as rows of four."""
    n_bytes, scales, _ = LAYOUTS[qtype]
    generator = np.random.default_rng(int(qtype))
    blocks = generator.integers(0, 256, (n_blocks, n_bytes), dtype=np.uint8)
    for start in scales:
        blocks[:, start : start + 2] = (
            generator.normal(0, 0.01, n_blocks).astype(np.float16).view(np.uint8).reshape(-1, 2)
        )
    return blocks.reshape(n_blocks // 4, -1)


@pytest.mark.parametrize("qtype", LAYOUTS, ids=lambda qtype: qtype.name)
def test_a_step_is_the_distance_of_neighbouring_codes(qtype):
    rows = random_rows(qtype)
    group = LAYOUTS[qtype][2]
    step = steps(rows, qtype).reshape(-1, group)
    assert (step == step[:, :1]).all()
    used = step[:, 0] > 0
    assert used.mean() > 0.9
    values = dequantize(rows, qtype).reshape(-1, group)[used]
    apart = np.sort(values - values.min(1, keepdims=True)) / step[used, :1]
    np.testing.assert_allclose(apart, apart.round(), atol=1e-3)
    gaps = np.diff(apart.round(), axis=1)
    assert gaps[gaps > 0].min() == 1


@pytest.mark.parametrize("qtype", LAYOUTS, ids=lambda qtype: qtype.name)
def test_noise_is_uniform_over_one_step(qtype):
    rows = random_rows(qtype, 1024)
    step = steps(rows, qtype)
    noise = (dither(rows, qtype, np.random.default_rng(1)) - dequantize(rows, qtype))[step > 0] / step[step > 0]
    assert np.abs(noise).max() < 0.501
    assert abs(noise.mean()) < 0.01
    assert noise.std() == pytest.approx(1 / np.sqrt(12), rel=0.01)
    again = dither(rows, qtype, np.random.default_rng(1))
    assert (again == dither(rows, qtype, np.random.default_rng(1))).all()
    assert (again != dither(rows, qtype, np.random.default_rng(2))).any()


def tiny_gemma3(width):
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=width, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, layer_types=["sliding_attention", "full_attention"], sliding_window=8,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(24)[None] * 5 % 64).logits


def pad_model(source, change=lambda name, weights: weights):
    """The wider model, through the GGUF names that `padded` goes by. GGUF holds 1 + the weight of a norm."""
    names = get_tensor_name_map(MODEL_ARCH.GEMMA3, LAYERS)
    target = tiny_gemma3(PADDED_WIDTH)
    parameters = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        gguf_name = names.get_name(name.removesuffix(".weight")) + ".weight"
        one = 1.0 if "norm" in name else 0.0
        wide = change(gguf_name, padded(gguf_name, parameter.detach().numpy() + np.float32(one), PADDED_WIDTH))
        parameters[name].data = torch.from_numpy(np.asarray(wide - np.float32(one), np.float32))
    return target


@pytest.fixture(scope="module")
def source():
    model = tiny_gemma3(WIDTH)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
        elif "embed" not in name:
            parameter.data *= 5  # so that attention and feed-forward count beside the embeddings
    return model


def test_padding_changes_no_prediction(source):
    assert tolerances.rms_error(logits(pad_model(source)), logits(source)) < tolerances.PADDED_LOGITS


@pytest.mark.parametrize(
    "role", ["ffn_norm", "output_norm", "post_attention_norm", "post_ffw_norm", "token_embd", "attn_q_norm"]
)
def test_another_scale_of_a_tensor_breaks_the_bound(source, role):
    """Of attn_norm the norms of queries, keys and the attention's output take it out."""
    wide = pad_model(source, lambda name, weights: weights * 1.1 if f"{role}.weight" in name else weights)
    assert tolerances.rms_error(logits(wide), logits(source)) > tolerances.PADDED_LOGITS


def test_without_padding_nothing_changes():
    weights = np.random.default_rng(0).standard_normal((WIDTH, 48)).astype(np.float32)
    assert (padded("blk.0.ffn_down.weight", weights, WIDTH) == weights).all()
