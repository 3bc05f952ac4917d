"""An imatrix from calibration statistics equals what llama-imatrix computes on the same tokens."""

import numpy as np
import pytest
import torch
from small_models import CONTEXT, ROOT
from tolerances import CALIBRATED_IMATRIX
from transformers import AutoTokenizer
from typer.testing import CliRunner

from gguf_mixed.cli import app
from gguf_mixed.errors import InputError
from gguf_mixed.fisher import fisher_sensitivity, read_fisher
from gguf_mixed.imatrix_compute import compute_imatrix
from gguf_mixed.imatrix_gguf import read_imatrix
from gguf_mixed.llama_cpp import find_tool, run_tool
from gguf_mixed.statistics_file import read_as_imatrix
from gguf_mixed.tensors import read_inventory
from vllm_gemma4q.calibration.calibrate import Calibration, calibrate
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.texts import Samples
from vllm_gemma4q.checkpoint import open_checkpoint

CHUNKS = 3


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small gain nothing from a second thread, and lose much where a core is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def chunks(folder, text):
    """The tokens that llama-imatrix runs: the text cut into chunks, each beginning with BOS instead of its first."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text.read_text(), add_special_tokens=False)]
    return [
        [tokenizer.bos_token_id, *ids[start + 1 : start + CONTEXT]] for start in range(0, CHUNKS * CONTEXT, CONTEXT)
    ]


@pytest.fixture(scope="module", params=["dense", "moe"])
def pair(request, llama_quantize, small_gguf, held_out_text, tmp_path_factory):
    """(model, statistics file with a Fisher file beside it, the imatrix of llama-imatrix)"""
    folder, kind = tmp_path_factory.mktemp("statistics"), request.param
    checkpoint, model = ROOT / "examples" / "small_gemma4" / kind, small_gguf(kind)
    text = [{"name": held_out_text.name, "sha256": "0"}]
    samples = Samples(chunks(checkpoint, held_out_text), [0] * CHUNKS, text, "plain text")
    decoder = Decoder(open_checkpoint(checkpoint), torch.float32)
    calibration = Calibration(decoder, samples, CONTEXT, 1 << 30, passes=1)
    statistics = folder / "statistics.safetensors"
    calibrate(calibration, statistics, folder / "work", folder / "fisher.safetensors")
    tool = find_tool("llama-imatrix")
    theirs = compute_imatrix(
        tool, model, held_out_text, folder / "theirs.gguf", chunks=CHUNKS, context=CONTEXT, threads=1
    )
    return model, statistics, theirs


def deviations(ours, theirs):
    """Of weights and of totals, over those of all entries; matrices that saw something."""
    assert ours.entries.keys() == theirs.entries.keys()
    pairs = [(entry, theirs.entries[name]) for name, entry in ours.entries.items()]
    weights = [np.linalg.norm(a.weights - b.weights) / np.linalg.norm(b.weights) for a, b in pairs]
    totals = [np.linalg.norm(a.totals - b.totals) / np.sqrt((b.sums * b.counts[:, None]).sum()) for a, b in pairs]
    return max(weights), max(totals)


def test_equals_llama_imatrix(pair):
    model, statistics, theirs = pair
    ours = read_as_imatrix(statistics)
    assert ours.matches(read_inventory(model)) == ("token_embd.weight",)
    assert (ours.chunk_count, ours.chunk_size) == (theirs.chunk_count, theirs.chunk_size)
    assert max(deviations(ours, theirs)) < CALIBRATED_IMATRIX
    moved = moved_counts = 0
    for name, entry in ours.entries.items():
        assert entry.counts.sum() == theirs.entries[name].counts.sum()
        moved += np.abs(entry.counts - theirs.entries[name].counts).sum()
        moved_counts += entry.counts.sum()
    assert moved <= CALIBRATED_IMATRIX * moved_counts  # a token on the edge between two experts


def test_other_sums_break_the_bound(pair):
    _, statistics, theirs = pair
    ours = read_as_imatrix(statistics)
    for entry in ours.entries.values():
        entry.sums[:, ::2] *= 1.1
    assert deviations(ours, theirs)[0] > CALIBRATED_IMATRIX


def test_llama_quantize_takes_what_is_written(pair, llama_quantize, tmp_path):
    model, statistics, _ = pair
    output = tmp_path / "imatrix.gguf"
    done = CliRunner().invoke(app, ["imatrix", str(statistics), "--write", str(output)])
    assert done.exit_code == 0, done.output
    assert read_imatrix(output) == read_as_imatrix(statistics)
    quantized = tmp_path / "q.gguf"
    lines = run_tool(
        [str(llama_quantize), "--imatrix", str(output), str(model), str(quantized), "IQ4_NL", "1"], lambda line: None
    )
    n_entries = len(read_imatrix(output).entries)
    assert any(f"loaded {n_entries} importance matrix entries" in line for line in lines), "\n".join(lines)
    assert not any("did not find weights" in line and "token_embd" not in line for line in lines)


def test_fisher_file_is_of_the_model(pair):
    model, statistics, _ = pair
    sensitivity = fisher_sensitivity(read_fisher(statistics.with_name("fisher.safetensors")))
    wanted = [tensor for tensor in read_inventory(model).tensors.values() if not tensor.kept_because]
    assert "token_embd.weight" in {tensor.name for tensor in wanted}
    for tensor in wanted:
        found = sensitivity.of(tensor)
        found.check(tensor)
        assert found.rows.sum() > 0
        assert found.columns.sum() > 0


def test_other_files(tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(InputError, match=r"other.safetensors: cannot be read as a statistics file"):
        read_as_imatrix(path)
