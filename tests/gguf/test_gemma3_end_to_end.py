"""From a real published model to a measured plan: Gemma 3 270M through every command a user types.

Sensitivity is the role prior here: Fisher information of this model takes minutes, and is in
benchmarks/gguf_allocation.py.
"""

import json
import sys

import pytest
from quantize_runs import ok
from small_models import ROOT

from gguf_mixed.tensors import read_inventory

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "examples"))

import gemma3_270m
from small_gemma4 import corpus

EMBEDDINGS = "token_embd=q6_k"
MIX = "q3_k_m"


@pytest.fixture(scope="module")
def model(llama_quantize):
    return gemma3_270m.reference(progress=False)


def test_a_plan_is_written_verified_and_better_than_the_mix_of_its_size(model, held_out_text, tmp_path):
    imatrix, text = tmp_path / "imatrix.gguf", tmp_path / "text.txt"
    text.write_text("\n\n".join(corpus.training_sections()), encoding="utf-8")
    computed = ok("compute-imatrix", model, "-o", imatrix, "--text", text, "--chunks", 8, "--no-output", "--json")
    assert json.loads(computed.stdout).items() >= {"output": str(imatrix), "chunks": 8}.items()
    given = ("--imatrix", imatrix)
    stock, ours = tmp_path / "stock.gguf", tmp_path / "ours.gguf"
    ok("plan", model, "--recipe", f"stock-{MIX}", *given, "-o", tmp_path / "stock.txt")
    ok("quantize", model, stock, "--overrides", tmp_path / "stock.txt", *given)
    size = stock.stat().st_size
    cache = ("--cache", tmp_path / "errors.jsonl")
    planned = ("--recipe", "optimal", "--size", size, "--pin", EMBEDDINGS, "-o", tmp_path / "ours.txt")
    ok("plan", model, *planned, *given, *cache)
    ok("quantize", model, ours, "--overrides", tmp_path / "ours.txt", *given)
    ok("verify", ours, tmp_path / "ours.txt")
    assert 0.999 * size < ours.stat().st_size <= size
    types = {name: tensor.qtype.name for name, tensor in read_inventory(ours).tensors.items()}
    assert types["token_embd.weight"] == "Q6_K" and len(set(types.values())) > 4

    report = json.loads(ok("divergence", model, stock, ours, "--text", held_out_text, "--chunks", 3, "--json").stdout)
    measured = {entry["model"]: entry["divergence"]["mean_kld"] for entry in report["models"]}
    assert measured[str(ours)] < measured[str(stock)]
