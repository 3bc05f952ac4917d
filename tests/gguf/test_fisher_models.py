"""Fisher marginals of the small trained models: they predict what storing one tensor in few bits costs."""

import sys

import numpy as np
import pytest
import torch
from gemma4q_kernels.ggml import GGMLQuantizationType
from scipy.stats import spearmanr
from small_models import ROOT
from tolerances import FISHER_PREDICTION

from gguf_mixed.backward import accumulate, load
from gguf_mixed.errors import InputError
from gguf_mixed.fisher import Fisher, fisher_sensitivity
from gguf_mixed.measure import load_quantizers, measure
from gguf_mixed.samples import cut_samples
from gguf_mixed.tensors import read_inventory

sys.path.insert(0, str(ROOT / "examples"))
from small_gemma4 import corpus

T = GGMLQuantizationType
COARSE = T.Q4_0  # rows of any length can have it
LENGTH = 192


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small gain nothing from a second thread, and lose much where a core is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def checkpoint(kind):
    return ROOT / "examples" / "small_gemma4" / kind


@torch.no_grad()
def log_probabilities(model, samples):
    return [model.module(input_ids=torch.tensor([sample])).logits[0].log_softmax(-1) for sample in samples]


def divergence(reference, changed):
    sums = [(p.exp() * (p - q)).sum(-1) for p, q in zip(reference, changed, strict=True)]
    return float(torch.cat(sums).mean())


def stored(quantizers, parameter, qtype):
    rows = parameter.detach().numpy().reshape(-1, parameter.shape[-1])
    return torch.from_numpy(quantizers.round_trip(np.ascontiguousarray(rows), qtype, None)).reshape(parameter.shape)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_predicted_and_measured_divergence_of_each_tensor(llama_quantize, small_gguf, held_out_text, kind):
    inventory = read_inventory(small_gguf(kind))
    model, quantizers = load(inventory, checkpoint(kind)), load_quantizers()
    samples = cut_samples(model.tokenizer, "\n\n".join(corpus.training_sections()), 48, LENGTH)
    marginals, positions = accumulate(model, samples)
    sensitivity = fisher_sensitivity(Fisher(marginals, positions))
    table = {row.tensor: row.error for row in measure(inventory, quantizers, sensitivity, types=[COARSE])}

    held_out = cut_samples(model.tokenizer, held_out_text.read_text(), 6, LENGTH)
    reference, measured = log_probabilities(model, held_out), {}
    for name, parameter in model.parameters.items():
        original = parameter.detach().clone()
        parameter.data.copy_(stored(quantizers, parameter, COARSE))
        measured[name] = divergence(reference, log_probabilities(model, held_out))
        parameter.data.copy_(original)
    least_order, most_total = FISHER_PREDICTION
    predicted = np.array([table[name] for name in measured])
    actual = np.array(list(measured.values()))
    assert spearmanr(predicted, actual).statistic > least_order
    assert 1 / most_total < predicted.sum() / actual.sum() < most_total
    # Shuffled among tensors, the same numbers say nothing.
    assert spearmanr(np.roll(predicted, 3), actual).statistic < least_order


def test_a_checkpoint_of_another_model(llama_quantize, small_gguf):
    with pytest.raises(InputError, match="tensor blk.0.ffn_down_exps.weight: no counterpart in the checkpoint"):
        load(read_inventory(small_gguf("moe")), checkpoint("dense"))
    dense = read_inventory(small_gguf("dense"))
    weights = bytearray(dense.path.read_bytes())
    changed = dense.tensors["blk.1.attn_q.weight"]
    start, row = changed.start, 4 * changed.row_length
    weights[start : start + 2 * row] = weights[start + row : start + 2 * row] + weights[start : start + row]
    other = dense.path.with_name("swapped.gguf")
    other.write_bytes(weights)
    with pytest.raises(InputError, match="tensor blk.1.attn_q.weight: the checkpoint's weights differ"):
        load(read_inventory(other), checkpoint("dense"))


def test_models_that_transformers_cannot_load(llama_quantize, small_gguf, tmp_path):
    with pytest.raises(InputError, match=r"transformers cannot load dense-f32.gguf, try --checkpoint FOLDER: "):
        load(read_inventory(small_gguf("dense")))
    with pytest.raises(InputError, match=f"transformers cannot load {tmp_path.name}: "):
        load(read_inventory(small_gguf("dense")), tmp_path)
