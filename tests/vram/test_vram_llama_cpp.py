"""A real llama.cpp allocates the bytes that we say, for the small dense model with its windows of 64 tokens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gguf_mixed.errors import InputError
from gguf_mixed.llama_cpp import cache_folder, find_tool
from vllm_gemma4q.vram.engines import LlamaCpp, Request
from vllm_gemma4q.vram.source import open_source

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
_CACHE = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB \( *(\d+) cells, +(\d+) layers")


@pytest.fixture(scope="module")
def perplexity():
    """llama-perplexity: the machine's own, else one built into the cache (about six minutes on two cores)."""
    converter = cache_folder() / "source" / "convert_hf_to_gguf.py"
    try:
        found = find_tool("llama-perplexity")
    except InputError:
        found = None
    if found is None or not converter.exists():
        subprocess.run([sys.executable, ROOT / "environment" / "build_llama_cpp.py"], check=True)
    return find_tool("llama-perplexity"), converter


@pytest.fixture(scope="module")
def model(perplexity, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "dense.gguf"
    source = ROOT / "examples" / "small_gemma4" / "dense"
    command = [sys.executable, perplexity[1], source, "--outtype", "f16", "--outfile", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "ubatch", "swa_full"), [(2048, 512, False), (1024, 256, False), (512, 512, False), (1024, 256, True)]
)
def test_cells_and_bytes(perplexity, model, tmp_path, tokens, ubatch, swa_full):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 1500)
    command = [
        perplexity[0],
        "-m",
        model,
        "-f",
        text,
        "-c",
        tokens,
        "-b",
        tokens,
        "-ub",
        ubatch,
        "-t",
        1,
        "--chunks",
        1,
    ]
    command += ["-v", *(["--swa-full"] if swa_full else [])]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = _CACHE.findall(done.stdout + done.stderr)
    allocated = {(int(cells), int(layers)): float(size) * MIB for size, cells, layers in found}
    assert {layers for _, layers in allocated} == {2, 4}
    # Printed to a hundredth of a MiB; these sizes are multiples of a quarter.
    source, request = open_source(model), Request(in_flight=ubatch, swa_full=swa_full)
    assert LlamaCpp().cache_bytes(source, request, tokens) == sum(allocated.values())
