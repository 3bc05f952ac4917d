"""The streamed backward pass equals that of the whole model, with the same labels."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from calibration_runs import IN_MEMORY, calibration, small
from safetensors.torch import load_file, save_file
from tolerances import CALIBRATED_FISHER
from transformers import AutoModelForCausalLM

from gguf_mixed.backward import Model, accumulate
from gguf_mixed.fisher import read_fisher
from gguf_mixed.hf_names import GEMMA4, HfNames
from vllm_gemma4q.calibration import output_layer
from vllm_gemma4q.calibration.calibrate import calibrate
from vllm_gemma4q.calibration.fisher import chosen

PASSES, SEED = 3, 7


def untied(folder):
    """The dense model with an output layer of its own, and an uncapped one."""
    shutil.copytree(small("dense"), folder)
    weights = load_file(folder / "model.safetensors")
    embeddings = weights["model.language_model.embed_tokens.weight"]
    weights["lm_head.weight"] = (embeddings.float() * 1.5).flip(1).to(embeddings.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    config["text_config"]["final_logit_softcapping"] = None
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def whole_model(folder, samples):
    """Marginals by GGUF name, of every linear but routers, the embeddings and an output layer of its own."""
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    names = HfNames(GEMMA4, module.config.get_text_config().num_hidden_layers)
    parameters = {
        names.gguf(name): parameter
        for name, parameter in module.named_parameters()
        if re.search(r"_proj(\.weight)?$|embed_tokens|lm_head", name) and "vision" not in name
    }
    return accumulate(Model(module, None, parameters), samples, SEED)[0]


def run(folder, text, tmp_path):
    cut = calibration(folder, text)
    found = type(cut)(cut.decoder, cut.samples, cut.max_length, IN_MEMORY, passes=PASSES, seed=SEED)
    calibrate(found, tmp_path / "statistics", tmp_path / "work", tmp_path / "fisher")
    samples = [found.samples.ids[number] for number in found.differentiated]
    return read_fisher(tmp_path / "fisher"), samples


def deviation(found, expected):
    """Greatest deviation of a tensor's marginals from those expected, relative to their norm."""
    assert found.keys() == expected.keys()
    return max(
        float(np.linalg.norm(getattr(found[name], part) - getattr(whole, part)) / np.linalg.norm(getattr(whole, part)))
        for name, whole in expected.items()
        for part in ("rows", "columns")
    )


@pytest.mark.parametrize("which", ["dense", "moe", "untied"])
def test_equals_the_whole_model(which, text, tmp_path, monkeypatch):
    monkeypatch.setattr(output_layer, "_VALUES_AT_ONCE", 256 * 300)  # the vocabulary in four parts, one smaller
    folder = untied(tmp_path / "untied") if which == "untied" else small(which)
    fisher, samples = run(folder, text, tmp_path)
    expected = whole_model(folder, samples)
    assert deviation(fisher.marginals, expected) < CALIBRATED_FISHER
    assert ("output.weight" in expected) == (which == "untied")
    assert fisher.positions == sum(map(len, samples))
    assert (fisher.details["passes"], fisher.details["seed"]) == (PASSES, SEED)
    assert not (tmp_path / "work").exists()
    for found in fisher.marginals.values():
        found.rows[:, ::2] *= 1.1
    assert deviation(fisher.marginals, expected) > CALIBRATED_FISHER


def test_chosen_samples_are_spread_evenly():
    assert chosen(9, 3) == [0, 4, 8]
    assert chosen(2, 16) == [0, 1]
    assert chosen(512, 0) == []
