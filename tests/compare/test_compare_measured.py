"""What the real commands measured of real quantized models, from their result files to the table and the picture."""

import json
import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from gguf_mixed.errors import InputError
from gguf_mixed.llama_cpp import cache_folder, find_tool
from gguf_mixed.tensors import read_inventory
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.quark_int8 import quantize

ROOT = Path(__file__).resolve().parents[2]
DENSE = ROOT / "examples" / "small_gemma4" / "dense"
BIN = Path(sys.executable).parent
CHUNKS, CONTEXT = "4", "128"


def ok(*command, **environment):
    given = [str(part) for part in command]
    done = subprocess.run(given, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="module")
def text(folder):
    """Sections that the small models were not trained on."""
    spec = util.spec_from_file_location("held_out", DENSE.parent / "held_out.py")
    assert spec is not None and spec.loader is not None
    held_out = util.module_from_spec(spec)
    spec.loader.exec_module(held_out)
    path = folder / "held_out.txt"
    path.write_text("\n\n".join(held_out.natural_text()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def int8(folder):
    convert(quantize.plan(open_checkpoint(DENSE)), folder / "dense-int8", ["gemma4q", "quantize"], lambda _: None)
    return folder / "dense-int8"


@pytest.fixture(scope="module")
def ggufs(folder):
    """The model in F16 and Q4_K_M, by llama.cpp (built into the cache in about six minutes where it is missing)."""
    converter = cache_folder() / "source" / "convert_hf_to_gguf.py"
    try:
        found = find_tool("llama-quantize")
    except InputError:
        found = None
    if found is None or not converter.exists():
        ok(sys.executable, ROOT / "environment" / "build_llama_cpp.py")
        found = find_tool("llama-quantize")
    original, small = folder / "dense-F16.gguf", folder / "dense-Q4_K_M.gguf"
    ok(sys.executable, converter, DENSE, "--outtype", "f16", "--outfile", original)
    ok(found, original, small, "Q4_K_M", "1")
    return original, small


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.usefixtures("few_vllm_processes")
def test_vllm_and_llama_perplexity_in_one_table(compare, run, folder, text, int8, ggufs):
    """The example runs vLLM and compares; llama-perplexity's figures are added to its result."""
    source = folder / "dense"
    source.symlink_to(DENSE)
    vllm, llama, picture = folder / "dense-divergence.json", folder / "llama.json", folder / "dense-comparison.png"
    size = {"CHUNKS": CHUNKS, "CONTEXT": CONTEXT, "MEMORY": "2K"}
    out = ok(ROOT / "examples" / "compare.sh", source, text, int8, PATH=f"{BIN}:{os.environ['PATH']}", **size)
    assert out.endswith(f"Plot: {picture}\n") and picture.stat().st_size > 10_000
    measure = [BIN / "gguf-mixed", "divergence", *ggufs, "--text", text, "--chunks", CHUNKS, "--context", CONTEXT]
    llama.write_text(ok(*measure, "--threads", "1", "--json"))
    arguments = (source, int8, *ggufs, "--result", vllm, "--result", llama)
    found = compare(*arguments)
    one, two = found["text"]
    assert one["protocol"]["texts"] == two["protocol"]["texts"] and one["framing"] == two["framing"] == "raw"
    _check_vllm(one, json.loads(vllm.read_text()), source, int8)
    _check_llama(two, json.loads(llama.read_text()), ggufs)
    kld = [group["figures"][str(path)]["divergence"]["mean_kld"] for group, path in ((one, int8), (two, ggufs[1]))]
    assert 0 < kld[0] < kld[1]
    assert all(one["figures"][str(path)]["perplexity"] is None for path in ggufs)
    checkpoint, _, original, small = found["models"]
    assert original["parameters"] == checkpoint["parameters"]  # two formats' own books
    inventory = read_inventory(ggufs[1])
    rotations = inventory.tensors["rope_freqs.weight"]
    bits = 8 * (inventory.tensor_bytes - rotations.n_bytes) / (inventory.n_elements - rotations.n_elements)
    assert small["bits_a_weight"] == bits
    out = run("compare", *arguments)[1]
    windows = f"held_out.txt, {CHUNKS} windows of {CONTEXT} tokens (raw)"
    assert re.search(rf"text 1, raw: {re.escape(windows)}, vllm 0\.32\.0\S*, divergence from dense \(", out)
    assert f"text 2, raw: {windows}, llama.cpp, divergence from dense-F16.gguf (" in out


def _check_vllm(group, document, source, int8):
    measured = document["checkpoints"]
    assert group["figures"][str(int8)]["divergence"] == measured[str(int8)]["divergence"]["raw"]
    assert group["figures"][str(int8)]["perplexity"] == measured[str(int8)]["perplexity"]["raw"]
    assert group["figures"][str(source)]["perplexity"] == group["reference_perplexity"]


def _check_llama(group, document, ggufs):
    [model] = document["models"]
    figures = group["figures"][str(ggufs[1])]
    assert figures["divergence"]["mean_kld"] == model["divergence"]["mean_kld"]
    assert figures["perplexity"]["value"] == model["divergence"]["perplexity"]
    assert group["reference"]["name"] == ggufs[0].name and group["reference_perplexity"] is None
