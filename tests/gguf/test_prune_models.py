"""Pruned GGUF files of the small trained mixture against llama.cpp and transformers.

The checkpoint is pruned by other means, see `pruned_moe.pruned_checkpoints`, and converted by llama.cpp's own script.
"""

import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tolerances
from gguf import GGUFReader
from pruned_moe.pruned_checkpoints import UNIFORM, masked_logprobs, prune
from quantize_runs import ok
from small_models import CHUNKS, CONTEXT, POSITIONS, checkpoint, convert, quantize
from test_imatrix import REAL

from gguf_mixed.imatrix_gguf import read_imatrix, write_imatrix
from gguf_mixed.llama_cpp import find_tool
from gguf_mixed.perplexity import divergence, write_base
from gguf_mixed.tensors import read_inventory

EXPERTS, KEPT = 16, 12
BOS = 2
TOKENS_AT = 20  # of a base file, see `gguf_mixed.perplexity`
DERIVED = {"general.size_label"}  # the converter counts experts and parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With `drop.json`, the map of UNIFORM, and `moe`, a checkpoint with its experts alone."""
    folder = tmp_path_factory.mktemp("pruned")
    dropped = {str(layer): sorted({*range(EXPERTS)} - {*kept}) for layer, kept in enumerate(UNIFORM)}
    (folder / "drop.json").write_text(json.dumps(dropped))
    prune(checkpoint("moe"), folder / "moe", UNIFORM)
    return folder


@pytest.fixture(scope="module")
def pruned(folder):
    def once(source, name, *arguments):
        output = folder / f"{name}.gguf"
        if not output.exists():
            ok("prune", source, output, "--drop-map", folder / "drop.json", *arguments)
        return output

    return once


def contents(path):
    tensors = GGUFReader(path).tensors
    return {item.name: (item.tensor_type, item.shape.tolist(), item.data.tobytes()) for item in tensors}


def fields(path):
    return {key: [part.tobytes() for part in field.parts] for key, field in GGUFReader(path).fields.items()}


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", "q8_0"])
def test_the_gguf_of_the_pruned_checkpoint(small_gguf, folder, pruned, dtype):
    """Tensors and keys, byte for byte; q8_0 is what the converter itself quantizes."""
    expected = convert(folder / "moe", folder / f"converted-{dtype}.gguf", dtype)
    found = pruned(small_gguf("moe", dtype), f"moe-{dtype}")
    assert contents(found) == contents(expected) != contents(small_gguf("moe", dtype))
    ours, theirs = fields(found), fields(expected)
    assert list(ours) == list(theirs)
    assert {key for key in ours if ours[key] != theirs[key]} <= DERIVED
    assert GGUFReader(found).fields["gemma4.expert_count"].contents() == KEPT


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q8_0", "Q5_1", "IQ4_NL"])
def test_a_file_of_llama_quantize_pruned_is_that_of_the_pruned_file(llama_quantize, small_gguf, pruned, mix, tmp_path):
    """No imatrix. Rows of 256 are K-quants, those of 64 and 96 their substitutes."""
    source = tmp_path / "moe.gguf"
    source.symlink_to(small_gguf("moe", "bf16"))
    small = tmp_path / "small.gguf"
    small.symlink_to(pruned(small_gguf("moe", "bf16"), "moe-bf16"))
    whole = quantize(llama_quantize, source, mix)
    first, second = pruned(whole, f"pruned-{mix}"), quantize(llama_quantize, small, mix)
    assert contents(first) == contents(second)
    assert first.stat().st_size == second.stat().st_size


@pytest.fixture(scope="module")
def sliced(small_gguf, pruned, folder):
    """A pruned model and its imatrix, from one that llama-imatrix wrote."""
    output = folder / "sliced.gguf"
    given = ["--imatrix", REAL, "--imatrix-output", output]
    return pruned(small_gguf("moe", "bf16"), "with-imatrix", *given), output


@pytest.mark.parametrize("recipe", ["cd-q4_k_m", "uniform-iq3_xxs"])
def test_llama_quantize_takes_the_sliced_imatrix(llama_quantize, sliced, tmp_path, recipe):
    """And writes what `verify` expects, the bytes of ggml's library, and others with the experts' data exchanged."""
    model, data = sliced
    assert read_imatrix(data).matches(read_inventory(model)) == ()
    table, tool = tmp_path / "table.txt", ["--llama-cpp", llama_quantize.parent]
    ok("plan", model, "--recipe", recipe, "-o", table, "--imatrix", data)
    command = ["quantize", model, tmp_path / "q.gguf", "--overrides", table, "--imatrix", data, "--engine"]
    ok(*command, "llama-quantize", *tool)
    assert "the size are as planned" in ok("verify", tmp_path / "q.gguf", table).stdout
    written = contents(tmp_path / "q.gguf")
    ok(*command, "ggml", *tool, "--overwrite")
    assert contents(tmp_path / "q.gguf") == written
    reversed_experts = read_imatrix(data).slice_experts(
        lambda name: range(KEPT)[::-1] if "_exps" in name else None, KEPT
    )
    exchanged = tmp_path / "exchanged.gguf"
    write_imatrix(reversed_experts, exchanged)
    ok("plan", model, "--recipe", recipe, "-o", table, "--imatrix", exchanged)  # a table is its imatrix's alone
    command[command.index(data)] = exchanged
    ok(*command, "llama-quantize", *tool, "--overwrite")
    assert contents(tmp_path / "q.gguf") != written


def test_llama_quantize_stops_at_the_imatrix_of_all_experts(llama_quantize, sliced, tmp_path):
    command = [llama_quantize, "--imatrix", REAL, sliced[0], tmp_path / "q.gguf", "Q4_K_M", "1"]
    finished = subprocess.run(command, capture_output=True, check=False)
    assert finished.returncode == 1


def transformers_perplexity(chunks, kept):
    """What llama-perplexity computes: over the later half of each chunk, which starts with BOS."""
    prompts = [[BOS, *chunk[1:].tolist()] for chunk in chunks]
    losses = [
        -np.take_along_axis(scores, np.array(prompt[1:])[:, None], 1)[CONTEXT // 2 :].mean(dtype=np.float64)
        for prompt, scores in zip(prompts, masked_logprobs(checkpoint("moe"), kept, prompts), strict=True)
    ]
    return math.exp(np.mean(losses))


def test_llama_cpp_runs_it_as_transformers_runs_masked_routers(small_gguf, pruned, folder, held_out_text):
    """The same perplexity on the same tokens; not that of all experts, nor with the scales of one layer's changed."""
    tool, model = find_tool("llama-perplexity"), pruned(small_gguf("moe", "f32"), "moe-f32")
    base = folder / "moe.kld"
    write_base(tool, small_gguf("moe", "f32"), held_out_text, base, chunks=CHUNKS, context=CONTEXT, threads=1)
    found = divergence(tool, model, base, threads=1)
    assert (found.positions, found.chunks) == (POSITIONS, CHUNKS)
    chunks = np.fromfile(base, "<i4", CHUNKS * CONTEXT, offset=TOKENS_AT).reshape(CHUNKS, CONTEXT)
    masked = transformers_perplexity(chunks, UNIFORM)
    whole = transformers_perplexity(chunks, [range(EXPERTS)] * len(UNIFORM))
    scaled = Path(shutil.copy(model, folder / "scaled.gguf"))
    tensor = read_inventory(scaled).tensors["blk.1.ffn_down_exps.scale"]
    scales = np.memmap(scaled, "<f4", "r+", tensor.start, (tensor.n_elements,))
    scales[: KEPT // 2] *= 1.1
    scales.flush()
    broken = divergence(tool, scaled, base, threads=1)
    apart = [abs(math.log(other / masked)) for other in (found.perplexity, broken.perplexity, whole)]
    print(f"llama.cpp {found.perplexity:.4f}, transformers {masked:.4f}, log apart {apart}")
    assert apart[0] < tolerances.PRUNED_LOSS < min(apart[1:])
