"""Fisher marginals: against gradients spelled out label by label, and the file that keeps them."""

import itertools

import numpy as np
import pytest
import torch
from gemma4q_kernels.ggml import GGMLQuantizationType
from gguf_files import write_gguf
from safetensors.numpy import save_file
from tolerances import FISHER_OF_DRAWN_LABELS

from gguf_mixed.backward import Model, accumulate
from gguf_mixed.errors import InputError
from gguf_mixed.fisher import FORMAT, Fisher, Marginals, fisher_sensitivity, read_fisher, write_fisher
from gguf_mixed.samples import cut_samples, read_texts
from gguf_mixed.sources import find_sensitivity
from gguf_mixed.tensors import read_inventory

F32 = GGMLQuantizationType.F32
EXPERTS = "blk.0.ffn_down_exps.weight"
VOCABULARY, WIDTH = 3, 4


class TinyModel(torch.nn.Module):
    """Embeddings, one linear, and the embeddings again as the output."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embeddings = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator))
        self.linear = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator))

    def forward(self, input_ids, use_cache=False):
        hidden = torch.nn.functional.embedding(input_ids, self.embeddings)
        logits = torch.tanh(hidden @ self.linear.T) @ self.embeddings.T
        return type("Output", (), {"logits": logits})


def exact_marginals(module, sample):
    """Expected squared gradients over every possible sequence of labels, by its probability."""
    parameters = {"embeddings": module.embeddings, "linear": module.linear}
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for labels in itertools.product(range(VOCABULARY), repeat=len(sample)):
        logs = module(torch.tensor([sample])).logits[0].log_softmax(-1)
        likelihood = logs[range(len(sample)), list(labels)].sum()
        gradients = torch.autograd.grad(likelihood, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            expected[name] += likelihood.detach().exp() * gradient.square()
    return {name: Marginals(f.sum(1).numpy()[None], f.sum(0).numpy()[None]) for name, f in expected.items()}


def deviation(found, expected):
    parts = [
        (getattr(found[name], part), getattr(expected[name], part)) for name in expected for part in ("rows", "columns")
    ]
    return max(float(np.abs(got - want).max() / want.mean()) for got, want in parts)


def test_expected_squared_gradients_over_the_models_own_labels():
    module, sample, draws = TinyModel(), [2, 0, 1], 1500
    right, wrong = TinyModel(), TinyModel()
    wrong.linear.data *= 1.1
    model = Model(module, None, {"embeddings": module.embeddings, "linear": module.linear})
    found, positions = accumulate(model, [sample] * draws, seed=1)
    assert positions == draws * len(sample)
    found = {name: Marginals(part.rows / draws, part.columns / draws) for name, part in found.items()}
    assert deviation(found, exact_marginals(right, sample)) < FISHER_OF_DRAWN_LABELS
    assert deviation(found, exact_marginals(wrong, sample)) > FISHER_OF_DRAWN_LABELS
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in module.parameters())


def test_the_same_seed_draws_the_same_labels():
    module = TinyModel()
    model = Model(module, None, {"linear": module.linear})
    one, two, other = (accumulate(model, [[0, 1, 2]] * 3, seed)[0]["linear"].rows for seed in (0, 0, 1))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def model_with_experts(folder):
    return read_inventory(write_gguf(folder / "m.gguf", [(EXPERTS, (32, 2, 3), F32)]))


def marginals(rows, columns):
    return Marginals(np.array(rows, np.float32), np.array(columns, np.float32))


def experts(visited=(True, True, True)):
    """Totals of 4, 8 and 12 by expert, none where it was never visited."""
    rows = [[n * seen, 3 * n * seen] for n, seen in zip((1, 2, 3), visited, strict=True)]
    return marginals(rows, [[sum(row) / 32] * 32 for row in rows])


def test_expected_divergence_is_half_the_fisher_a_position(tmp_path):
    write_fisher(tmp_path / "f.safetensors", Fisher({EXPERTS: experts()}, 10, {"seed": 7}))
    read = read_fisher(tmp_path / "f.safetensors")
    assert (read.positions, read.details) == (10, {"seed": 7})
    source = find_sensitivity(str(tmp_path / "f.safetensors"), model_with_experts(tmp_path))
    assert source.measured and source.source == "Fisher, 10 positions"
    tensor = model_with_experts(tmp_path).tensors[EXPERTS]
    found = source.of(tensor)
    found.check(tensor)
    each_weight = found.rows[:, :, None] * found.columns[:, None, :]
    assert np.allclose(each_weight[1, 1], 0.5 / 10 * 6 * 8 / 32 / 8)


def test_experts_without_data_count_as_the_mean_of_the_others(tmp_path):
    tensor = model_with_experts(tmp_path).tensors[EXPERTS]
    found = fisher_sensitivity(Fisher({EXPERTS: experts((True, False, True))}, 1)).of(tensor)
    assert np.allclose(found.rows[1], 0.5 * np.array([2, 6])) and np.allclose(found.columns[1], 1 / 32)
    dead = fisher_sensitivity(Fisher({EXPERTS: experts((False, False, False))}, 1)).of(tensor)
    assert not dead.rows.any()


def files(tmp_path):
    rows, columns = np.ones((3, 2), np.float32), np.ones((3, 32), np.float32)
    metadata = {"format": FORMAT, "positions": "10", "details": "{}"}
    good = {f"{EXPERTS}.rows": rows, f"{EXPERTS}.columns": columns}
    yield "expected rows and columns", {f"{EXPERTS}.rows": rows}, metadata
    yield "expected F32", {**good, f"{EXPERTS}.rows": rows.astype(np.float64)}, metadata
    yield "expected F32", {**good, f"{EXPERTS}.rows": rows[:2]}, metadata
    yield "negative or not finite", {**good, f"{EXPERTS}.rows": -rows}, metadata
    yield "negative or not finite", {**good, f"{EXPERTS}.columns": columns * np.nan}, metadata
    yield "got format None", good, {}
    yield "got 0 positions", good, {**metadata, "positions": "0"}
    yield "damaged metadata", good, {**metadata, "positions": "many"}


def test_damaged_files(tmp_path):
    path = tmp_path / "f.safetensors"
    for message, arrays, metadata in files(tmp_path):
        save_file(arrays, path, metadata)
        with pytest.raises(InputError, match=message):
            read_fisher(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="f.safetensors: cannot be read as a Fisher file"):
        read_fisher(path)
    with pytest.raises(InputError, match="nothing for tensor blk.0.ffn_down_exps.weight"):
        fisher_sensitivity(Fisher({}, 1)).of(model_with_experts(tmp_path).tensors[EXPERTS])
    with pytest.raises(InputError, match="expected a Fisher file"):
        find_sensitivity("fisher.bin", model_with_experts(tmp_path))


class LetterTokenizer:
    """One token a character; the template wraps turns in brackets."""

    bos_token_id = 0
    chat_template = None

    def encode(self, text, add_special_tokens):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def apply_chat_template(self, messages, tokenize):
        return "".join(f"[{message['role'][0]}{message['content']}]" for message in messages)


def test_samples_are_spread_over_the_text_and_framed():
    tokenizer, text = LetterTokenizer(), "".join(map(chr, range(200, 1000)))
    plain = cut_samples(tokenizer, text, 3, 101)
    assert [len(sample) for sample in plain] == [101] * 3 and all(sample[0] == 0 for sample in plain)
    assert [sample[1] for sample in plain] == [200, 550, 900]
    tokenizer.chat_template = "present"
    framed = tokenizer.decode(cut_samples(tokenizer, text, 1, 40)[0])
    assert framed == f"[u{text[:17]}][a{text[17:34]}]" and len(framed) == 40
    assert cut_samples(tokenizer, text, 3, 101, raw=True) == plain


def test_texts_that_cannot_be_cut(tmp_path):
    with pytest.raises(InputError, match=r"text: got 50 tokens, expected 297 for 3 samples of 100"):
        cut_samples(LetterTokenizer(), "x" * 50, 3, 100)
    with pytest.raises(InputError, match="length: got 8 tokens"):
        cut_samples(LetterTokenizer(), "x" * 50, 3, 8)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    for name, message in {"empty": "holds no text", "binary": "cannot be read", "missing": "cannot be read"}.items():
        with pytest.raises(InputError, match=f"{name}.txt: {message}"):
            read_texts([tmp_path / f"{name}.txt"])
