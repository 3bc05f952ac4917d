"""`gemma4q evaluate` through a real vLLM, beside llama-perplexity on a GGUF of the same checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tolerances
from small_models import CHUNKS, CONTEXT, POSITIONS, checkpoint

from gguf_mixed.llama_cpp import find_tool
from gguf_mixed.perplexity import divergence, write_base
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.quark_int8 import quantize

pytestmark = [pytest.mark.engine, pytest.mark.slow]
GEMMA4Q = Path(sys.executable).with_name("gemma4q")


@pytest.fixture(scope="module")
def report(held_out_text, tmp_path_factory):
    """The dense model beside itself in INT8: two starts of vLLM."""
    folder = tmp_path_factory.mktemp("evaluate")
    convert(quantize.plan(open_checkpoint(checkpoint("dense"))), folder / "int8", ["test"], lambda _: None)
    models = [checkpoint("dense"), folder / "int8"]
    size = ["--context", str(CONTEXT), "--chunks", str(CHUNKS)]
    command = [GEMMA4Q, "evaluate", "divergence", *models, "--text", held_out_text, *size, "--json"]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_perplexity_is_that_of_llama_cpp(report, llama_quantize, small_gguf, held_out_text, tmp_path):
    tool = find_tool("llama-perplexity")
    model = small_gguf("dense")
    base = write_base(tool, model, held_out_text, tmp_path / "base.kld", chunks=CHUNKS, context=CONTEXT, threads=1)
    theirs = divergence(tool, model, base.path, threads=1).perplexity
    ours = report["checkpoints"][str(checkpoint("dense"))]["perplexity"]["raw"]
    assert ours["positions"] == POSITIONS
    assert abs(ours["value"] / theirs - 1) < tolerances.PERPLEXITY_BESIDE_LLAMA_CPP


def test_figures_of_both_framings(report):
    dense, int8 = report["checkpoints"].values()
    assert report["protocol"]["windows"] == {"raw": CHUNKS, "chat": CHUNKS}
    assert report["protocol"]["engine"]["name"] == "vllm"
    assert "divergence" not in dense
    for framing in ("raw", "chat"):
        kld = int8["divergence"][framing]
        assert kld["positions"] == int8["perplexity"][framing]["positions"] == dense["perplexity"][framing]["positions"]
        assert 0 < kld["median_kld"] < kld["mean_kld"] < tolerances.QUARK_INT8_DIVERGENCE["dense"][0]
        assert kld["mean_kld"] < kld["p99_kld"] < kld["p999_kld"] <= kld["max_kld"]
        assert kld["same_top"] > 0.9
    assert dense["perplexity"]["raw"] != dense["perplexity"]["chat"]
