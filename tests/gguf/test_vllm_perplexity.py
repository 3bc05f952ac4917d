"""`gemma4q evaluate` through real engines: vLLM, transformers and llama.cpp beside each other and llama-perplexity."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tolerances
from scipy.special import log_softmax
from small_models import CHUNKS, CONTEXT, POSITIONS, checkpoint
from small_models import quantize as llama_quantized

from gguf_mixed.identity import model_sha256
from gguf_mixed.llama_cpp import find_tool
from gguf_mixed.perplexity import divergence, write_base
from gguf_mixed.tensors import read_inventory
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.distributions import compare
from vllm_gemma4q.evaluation.engines.settings import Settings
from vllm_gemma4q.evaluation.engines.transformers import Transformers
from vllm_gemma4q.evaluation.measure import load_protocol
from vllm_gemma4q.quark_int8 import quantize

pytestmark = [pytest.mark.engine, pytest.mark.slow]
GEMMA4Q = Path(sys.executable).with_name("gemma4q")
FIGURES = ("mean_kld", "median_kld", "p99_kld", "p999_kld", "same_top")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Of llama.cpp, whose threads wait for each other by spinning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_ARG_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def gguf(llama_quantize, small_gguf):
    """The dense model in BF16, and by llama-quantize's Q4_K_M."""
    return small_gguf("dense", "bf16"), llama_quantized(llama_quantize, small_gguf("dense", "bf16"), "Q4_K_M")


def evaluate(*arguments):
    command = [GEMMA4Q, "evaluate", *arguments, "--context", CONTEXT, "--chunks", CHUNKS]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def reported(*arguments):
    finished = evaluate(*arguments, "--json")
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def report(gguf, held_out_text, tmp_path_factory):
    """The dense model in vLLM beside itself in INT8 and as GGUF: two starts of vLLM."""
    int8 = tmp_path_factory.mktemp("evaluate") / "int8"
    convert(quantize.plan(open_checkpoint(checkpoint("dense"))), int8, ["test"], lambda _: None)
    return reported("divergence", checkpoint("dense"), int8, *gguf, "--text", held_out_text, "--noise-floor")


@pytest.fixture(scope="module")
def theirs(gguf, held_out_text, tmp_path_factory):
    """What llama-perplexity prints of Q4_K_M against BF16."""
    tool, path = find_tool("llama-perplexity"), tmp_path_factory.mktemp("theirs") / "base.kld"
    write_base(tool, gguf[0], held_out_text, path, chunks=CHUNKS, context=CONTEXT, options=["--no-escape"])
    return [divergence(tool, model, path) for model in gguf]


def test_vllm_beside_gguf(report, gguf):
    dense, int8, *ggufs = report["checkpoints"].values()
    assert report["protocol"]["windows"] == {"raw": CHUNKS}
    assert report["protocol"]["engine"]["name"] == "vllm"
    assert "divergence" not in dense
    assert [found.get("engine", {}).get("name") for found in (dense, int8, *ggufs)] == [None, None, *["llama.cpp"] * 2]
    for path, found in zip(gguf, ggufs, strict=True):
        assert found["model"] == {"name": path.name, "sha256": model_sha256(read_inventory(path))}
    for found in (int8, *ggufs):
        kld = found["divergence"]["raw"]
        assert kld["positions"] == found["perplexity"]["raw"]["positions"] == POSITIONS
        assert 0 < kld["median_kld"] < kld["mean_kld"] < kld["p99_kld"] < kld["p999_kld"] <= kld["max_kld"]
        assert kld["same_top"] > 0.9
    assert int8["divergence"]["raw"]["mean_kld"] < tolerances.QUARK_INT8_DIVERGENCE["dense"][0]
    # Of the same weights there is nothing but noise, of four bits there is more.
    floor = report["noise_floor"]["raw"]["mean_kld"]
    low, high = tolerances.NOISE_FLOOR
    assert low < floor < high
    same, four = (found["divergence"]["raw"]["mean_kld"] for found in ggufs)
    assert same < 2 * floor < 10 * floor < four


def test_perplexity_is_that_of_llama_cpp(report, theirs):
    dense, _, *ggufs = report["checkpoints"].values()
    for found, printed in zip(ggufs, theirs, strict=True):
        assert abs(found["perplexity"]["raw"]["value"] / printed.perplexity - 1) < 1e-5  # four decimals of it
        assert found["perplexity"]["raw"]["error"] == pytest.approx(printed.perplexity_error, abs=1e-4)
    assert dense["perplexity"]["raw"]["positions"] == POSITIONS
    ratio = dense["perplexity"]["raw"]["value"] / theirs[0].perplexity
    assert abs(ratio - 1) < tolerances.PERPLEXITY_BESIDE_LLAMA_CPP


def test_divergence_is_that_of_llama_cpp(gguf, held_out_text, theirs, tmp_path):
    found = reported("divergence", *gguf, "--text", held_out_text)
    assert found["protocol"]["engine"]["name"] == "llama.cpp"
    ours, printed = found["checkpoints"][str(gguf[1])], theirs[1]
    assert "engine" not in ours
    for name in FIGURES:
        ratio = ours["divergence"]["raw"][name] / getattr(printed, name)
        assert abs(ratio - 1) < tolerances.LLAMA_CPP_PARITY, name
    assert ours["divergence"]["raw"]["error"] == pytest.approx(printed.mean_kld_error, rel=0.01)
    # The same, but for the other's log-probabilities: times 1.1.
    protocol = load_protocol(gguf, [held_out_text], None, CONTEXT, CHUNKS, Settings(), tmp_path / "log")
    files = [tmp_path / "reference", tmp_path / "other"]
    measured = [protocol.run(path, tmp_path / "log", file) for path, file in zip(gguf, files, strict=True)]
    width = measured[0].vocabulary
    assert compare(*files, width, floor=-16).mean_kld == ours["divergence"]["raw"]["mean_kld"]
    times_11(files[1], width)
    assert abs(compare(*files, width, floor=-16).mean_kld / printed.mean_kld - 1) > tolerances.LLAMA_CPP_PARITY


def times_11(path, width):
    rows = 1.1 * np.fromfile(path, np.float32).reshape(-1, width)
    log_softmax(rows, axis=1).astype(np.float32).tofile(path)


@pytest.mark.usefixtures("few_vllm_processes")
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_vllm_and_transformers_agree_in_float32(kind, held_out_text, tmp_path):
    settings, log, model = Settings(dtype="float32"), tmp_path / "log", checkpoint(kind)
    protocol = load_protocol([model], [held_out_text], None, CONTEXT, CHUNKS, settings, log)
    one = protocol.run(model, log, tmp_path / "one")
    other = protocol.run(model, log, tmp_path / "other", Transformers("float32"))
    assert (one.engine, other.engine["name"]) == (None, "transformers")
    found = protocol.compare(one, other)
    assert set(found) == {"raw", "chat"}
    for framing, kld in found.items():
        assert kld.mean_kld < tolerances.ENGINES_IN_FLOAT32
        assert kld.same_top == 1
        assert abs(one.perplexity[framing].value / other.perplexity[framing].value - 1) < 1e-5
    times_11(tmp_path / "other", other.vocabulary)
    assert protocol.compare(one, other)["chat"].mean_kld > tolerances.ENGINES_IN_FLOAT32


def test_another_tokenizer_is_refused(gguf, tmp_path):
    """transformers takes a control token's name in a text for the token, llama.cpp for text. Backslashes are none."""
    text, log, models = tmp_path / "text.txt", tmp_path / "log", [checkpoint("dense"), gguf[0]]
    lines = r"A backslash and an n, \n, is no new line. "
    text.write_text(lines * 5 + "<eos>" + lines * 60)
    expected = r"dense-bf16.gguf: tokenizers differ: token \d+ of window 1 is \d+, expected 1, after '.*is no new line"
    with pytest.raises(InputError, match=expected):
        load_protocol(models, [text], None, CONTEXT, 2, Settings(), log)
    text.write_text(lines * 60)
    assert load_protocol(models, [text], None, CONTEXT, 2, Settings(), log).positions == POSITIONS * 2 // CHUNKS


def test_a_text_that_is_too_short(gguf, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A line.")
    with pytest.raises(InputError, match=f"{gguf[0]}: llama-perplexity: "):
        load_protocol([gguf[0]], [text], None, CONTEXT, None, Settings(), tmp_path / "log")
