"""Engines without vLLM: transformers layer by layer, llama-perplexity's file, and what is refused before a start."""

import json
import math
import re
import shutil
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tolerances
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gguf_mixed.perplexity import read_base
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.engines import logits_file
from vllm_gemma4q.evaluation.engines.interface import all_windows
from vllm_gemma4q.evaluation.engines.settings import EngineName, Settings
from vllm_gemma4q.evaluation.engines.transformers import Transformers
from vllm_gemma4q.evaluation.measure import load_protocol
from vllm_gemma4q.evaluation.windows import Framing, Window, chunk_windows

SMALL = Path(__file__).resolve().parents[2] / "examples" / "small_gemma4"
TEXT = "The interpreter reads a line, and then another one. Nothing is lost, since each has a number.\n" * 9
FLOAT32 = Settings(EngineName.TRANSFORMERS, "float32")
SIZE = ("--context", "64", "--chunks", "2")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def evaluate(gemma4q):
    return partial(gemma4q, "evaluate")


@torch.no_grad()
def whole_model(folder, windows):
    """Float32 log-probabilities of the predicted tokens' rows, from the whole model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [model(torch.tensor([list(window.tokens)])).logits[0].log_softmax(-1) for window in windows]
    return torch.cat([row[window.first - 1 : window.last - 1] for row, window in zip(rows, windows, strict=True)])


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_transformers_is_the_whole_model(kind, text, tmp_path):
    protocol = load_protocol([SMALL / kind], [text], None, 64, 2, FLOAT32, tmp_path / "log")
    measured = protocol.run(SMALL / kind, tmp_path / "log", tmp_path / "rows")
    rows = torch.from_numpy(np.fromfile(tmp_path / "rows", np.float32)).view(-1, measured.vocabulary)
    windows = all_windows(protocol.windows)
    expected = whole_model(SMALL / kind, windows)
    assert (rows - expected).abs().max() < tolerances.ENGINE_ROWS
    assert (rows - (1.1 * expected).log_softmax(-1)).abs().max() > tolerances.ENGINE_ROWS
    own = torch.tensor([token for window in windows for token in window.tokens[window.first : window.last]])
    told = expected.gather(1, own[:, None])[:, 0]
    n_raw = sum(window.n_predicted for window in protocol.windows[Framing.RAW])
    for framing, part in ((Framing.RAW, told[:n_raw]), (Framing.CHAT, told[n_raw:])):
        assert measured.perplexity[framing].value == pytest.approx(math.exp(-part.mean()), rel=1e-4)
        assert measured.perplexity[framing].positions == len(part)
    # Windows in several passes over the weights are the same windows.
    few = Transformers("float32", activation_bytes=70 * 256 * 4)
    protocol.run(SMALL / kind, tmp_path / "log", tmp_path / "again", few)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "rows").read_bytes()


def test_noise_floor_is_told(evaluate, text, tmp_path):
    """BF16 beside itself, and beside itself with the rows of one matrix moved by one."""
    moved = Path(shutil.copytree(SMALL / "dense", tmp_path / "moved"))
    tensors = load_file(moved / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("language_model.layers.0.mlp.down_proj.weight"))
    tensors[name] = tensors[name].roll(1, 0)
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    how = ("--engine", "transformers", "--framing", "raw")
    given = ("divergence", SMALL / "dense", moved, "--text", text, *SIZE, *how, "--noise-floor")
    code, out, err = evaluate(*given, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    floor = report["noise_floor"]["raw"]
    low, high = tolerances.NOISE_FLOOR
    assert low < floor["mean_kld"] < high
    assert floor["positions"] == 2 * 31
    assert report["protocol"]["engine"]["name"] == "transformers"
    assert set(report["checkpoints"]) == {str(SMALL / "dense"), str(moved)}
    far = report["checkpoints"][str(moved)]
    assert "engine" not in far and far["divergence"]["raw"]["mean_kld"] > 10 * floor["mean_kld"]
    code, out, err = evaluate(*given)
    assert code == 0 and f"{floor['mean_kld']:.5f} ±" in out and "in float32: the noise floor" in out
    assert "indistinguishable" not in out
    code, out, err = evaluate("divergence", SMALL / "dense", SMALL / "dense", *given[3:])
    assert f"{SMALL / 'dense'} (raw): indistinguishable from the reference" in out.replace("\n", " ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--dtype", "float32"), "--noise-floor: .*dense runs in float32 already, expected BF16"),
        (("--dtype", "float16"), "--dtype: got float16, expected one of auto, bfloat16, float32 with transformers"),
        (("--device", "cuda"), "--device cuda: torch sees no GPU"),
    ],
)
def test_refused_settings(change, message, evaluate, text):
    if change[0] == "--device" and torch.cuda.is_available():
        change, message = ("--dtype", "half"), "--dtype: got half"
    how = ("--engine", "transformers", "--noise-floor", "--text", text, *SIZE)
    code, out, err = evaluate("divergence", SMALL / "dense", SMALL / "dense", *how, *change)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert re.search(message, err)


def test_refused_models(evaluate, text, tmp_path):
    how = ("--engine", "transformers", "--text", text, *SIZE)
    quantized = Path(shutil.copytree(SMALL / "dense", tmp_path / "int8"))
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "quark"}}))
    assert evaluate("perplexity", quantized, *how) == (
        2,
        "",
        f"error: {quantized}: quantized (quark), which transformers does not load; expected --engine vllm\n",
    )
    gguf = tmp_path / "model.gguf"
    assert evaluate("perplexity", SMALL / "dense", gguf, *how, "--framing", "chat") == (
        2,
        "",
        "error: --framing chat: got model.gguf, expected raw: llama-perplexity knows no chat template\n",
    )


def test_rows_of_a_saved_run(tmp_path):
    """Written as llama-perplexity writes it, and read back; an odd vocabulary has one code more."""
    context, vocabulary, chunks = 8, 11, 3
    tokens = np.arange(chunks * context, dtype="<i4")
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 65536, (chunks * 3, vocabulary + 1), np.uint16)
    scales = rng.uniform(1e-4, 2e-4, chunks * 3).astype("<f4")
    least = rng.uniform(-20, -16, chunks * 3).astype("<f4")
    rows = b"".join(
        struct.pack("<ff", scale, low) + row.tobytes() for scale, low, row in zip(scales, least, codes, strict=True)
    )
    path = tmp_path / "base"
    path.write_bytes(b"_logits_" + struct.pack("<iii", context, vocabulary, chunks) + tokens.tobytes() + rows)
    logits_file.write_rows(read_base(path), tmp_path / "rows")
    found = np.fromfile(tmp_path / "rows", np.float32).reshape(-1, vocabulary)
    expected = codes[:, :vocabulary] * scales.astype(np.float64)[:, None] + least.astype(np.float64)[:, None]
    assert np.abs(found - expected).max() < 4e-6  # float32 near 16
    header = logits_file.read_header(path)
    assert header.vocabulary == vocabulary and np.array_equal(header.tokens, tokens.reshape(chunks, context))
    for size in (0, 12, 20, 20 + 4 * chunks * context - 1):
        (tmp_path / "part").write_bytes(path.read_bytes()[:size])
        assert logits_file.read_header(tmp_path / "part") is None
    assert logits_file.read_header(tmp_path / "none") is None


def test_tokens_are_compared():
    """But for the first of a chunk: in its place the model gets the beginning."""
    windows = [Window([2, *range(start + 1, start + 8)], 5, 8) for start in (0, 8, 16)]
    tokens = np.arange(24, dtype=np.int32).reshape(3, 8)
    logits_file.check_tokens(Path("m.gguf"), tokens, windows)
    with pytest.raises(InputError, match="m.gguf: makes 2 windows of the text, expected 3: tokenizers differ"):
        logits_file.check_tokens(Path("m.gguf"), tokens[:2], windows)
    tokens[1, 5] = 99
    with pytest.raises(InputError, match="m.gguf: tokenizers differ: token 5 of window 2 is 99, expected 13$"):
        logits_file.check_tokens(Path("m.gguf"), tokens, windows)


def test_windows_of_cut_text():
    windows = chunk_windows([[2, 10, 11, 12, 13], [14, 15, 16, 17, 18]], None)
    assert [list(window.tokens) for window in windows] == [[2, 10, 11, 12, 13], [2, 15, 16, 17, 18]]
    assert {(window.first, window.last) for window in windows} == {(3, 5)}
    with pytest.raises(InputError, match="got 1 windows of 2 tokens, expected 3"):
        chunk_windows([[2, 3]], 3)
