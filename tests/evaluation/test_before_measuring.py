"""What `gemma4q evaluate` finds out before the first of its models takes hours: later models, room, places to write."""

import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gguf_mixed.atomic_file import WriteError
from gguf_mixed.perplexity import Base, base_bytes
from vllm_gemma4q.commands.evaluate import engine_log
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.engines import logits_file
from vllm_gemma4q.evaluation.engines.llama_cpp import LlamaCpp
from vllm_gemma4q.evaluation.engines.settings import EngineName, Settings
from vllm_gemma4q.evaluation.engines.transformers import Transformers
from vllm_gemma4q.evaluation.engines.vllm import VLLM
from vllm_gemma4q.evaluation.measure import Protocol, load_protocol
from vllm_gemma4q.evaluation.windows import Framing, Window

DENSE = Path(__file__).resolve().parents[2] / "examples" / "small_gemma4" / "dense"
VOCABULARY = 1024
FULL = Path("/dev/full")
TRANSFORMERS = ("--engine", "transformers", "--framing", "raw")


class MeasuredError(Exception):
    """An engine was asked to score."""


@pytest.fixture
def never(monkeypatch):
    def score(*_):
        raise MeasuredError

    for engine in (Transformers, VLLM, LlamaCpp):
        monkeypatch.setattr(engine, "score", score)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The interpreter reads a line, and then another one.\n" * 20)
    return path


@pytest.fixture
def evaluate(gemma4q, text):
    return partial(gemma4q, "evaluate")


def quantized(folder):
    shutil.copytree(DENSE, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "quark"}}))
    return folder


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize("command", [("perplexity", DENSE), ("divergence", DENSE, DENSE)], ids=lambda each: each[0])
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_every_model_is_opened_first(command, engine, evaluate, text, tmp_path):
    options = ("--text", text, "--context", 64, "--chunks", 2, "--engine", engine)
    if engine == "vllm":
        pytest.importorskip("vllm")
    missing = tmp_path / "typo"
    assert evaluate(*command, missing, *options) == (2, "", f"error: {missing}: not a folder\n")
    (missing / "empty").mkdir(parents=True)
    code, _, err = evaluate(*command, missing, *options)
    assert code == 2 and err.count("\n") == 1 and "config.json" in err
    if engine == "transformers":
        code, _, err = evaluate(*command, quantized(tmp_path / "int8"), *options)
        assert code == 2 and err.startswith(f"error: {tmp_path / 'int8'}: quantized (quark), which transformers")
    with pytest.raises(MeasuredError):
        evaluate(*command, DENSE, *options)


@pytest.mark.usefixtures("never")
def test_distributions_that_do_not_fit(evaluate, text, tmp_path, monkeypatch):
    """31 of 64 tokens in each of two windows, four bytes for each of the vocabulary, of two models."""
    needed, real = 2 * 2 * 31 * 4 * VOCABULARY, shutil.disk_usage(tmp_path)
    given = ("divergence", DENSE, DENSE, "--text", text, "--context", 64, "--chunks", 2, *TRANSFORMERS)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=needed - 1))
    expected = (
        f"distributions of two models take {needed:,} bytes, and {needed - 1:,} are free: "
        "fewer --chunks, or another --work\n"
    )
    assert evaluate(*given, "--work", tmp_path) == (2, "", f"error: {tmp_path}: {expected}")
    assert evaluate(*given) == (2, "", f"error: {tempfile.gettempdir()}: {expected}")
    assert list(tmp_path.iterdir()) == [text]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=needed))
    with pytest.raises(MeasuredError):
        evaluate(*given, "--work", tmp_path)


def test_the_room_for_gguf(tmp_path, monkeypatch):
    """llama.cpp's own file lies beside the second one until that is written."""
    widths = {"reference.gguf": 1000, "wide.gguf": 1001}
    monkeypatch.setattr(LlamaCpp, "vocabulary", lambda self, model: widths[model.name])
    window = Window(range(64), 33, 64)
    protocol = Protocol({Framing.RAW: [window] * 3}, [], 64, only_gguf=True)
    needed = 3 * 31 * 4 * (1000 + 1001) + base_bytes(1001, 3, 64)
    real = shutil.disk_usage(tmp_path)
    models = Path("reference.gguf"), [Path("wide.gguf")]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=needed))
    protocol.check_room(*models, tmp_path, "another --work")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=needed - 1))
    with pytest.raises(InputError, match=f"take {needed:,} bytes"):
        protocol.check_room(*models, tmp_path, "another --work")


def test_a_disk_that_is_full_in_the_end(text, tmp_path):
    settings = Settings(EngineName.TRANSFORMERS, "float32")
    protocol = load_protocol([DENSE], [text], [Framing.RAW], 64, 2, settings, tmp_path / "log")
    with pytest.raises(WriteError, match="/dev/full: cannot be written: No space left on device"):
        protocol.run(DENSE, tmp_path / "log", FULL)
    context, vocabulary, chunks = 8, 10_000, 2
    path = tmp_path / "base"
    path.write_bytes(bytes(base_bytes(vocabulary, chunks, context)))
    with pytest.raises(WriteError, match="/dev/full: cannot be written: No space left on device"):
        logits_file.write_rows(Base(path, context, vocabulary, chunks), FULL)


def test_llama_cpp_text_and_log_on_a_full_disk(tmp_path, monkeypatch):
    (tmp_path / "text.txt").symlink_to(FULL)
    engine = LlamaCpp("text" * 10_000)
    with pytest.raises(WriteError, match=r"text.txt: cannot be written: No space left"):
        engine._write(tmp_path)
    monkeypatch.setattr(LlamaCpp, "_tool", Path("llama-perplexity"))
    monkeypatch.setattr(LlamaCpp, "_write", lambda self, folder: folder / "text.txt")
    monkeypatch.setattr("vllm_gemma4q.evaluation.engines.llama_cpp.text_command", lambda *_: [])
    monkeypatch.setattr("vllm_gemma4q.evaluation.engines.llama_cpp.run_tool", lambda command, log, _: log("a line"))
    with pytest.raises(WriteError, match="/dev/full: cannot be written: No space left"):
        engine.score(Path("m.gguf"), {Framing.RAW: [Window(np.arange(8), 5, 8)]}, FULL)


@pytest.mark.usefixtures("never")
def test_a_log_that_cannot_be_written(evaluate, text, tmp_path):
    given = ("perplexity", DENSE, "--text", text, "--context", 64, "--chunks", 2, *TRANSFORMERS, "--log")
    log = tmp_path / "none" / "log"
    expected = f"error: {log}: cannot be written: No such file or directory\n"
    assert evaluate(*given, log) == (2, "", expected)
    assert evaluate(*given, tmp_path) == (2, "", f"error: {tmp_path}: cannot be written: Is a directory\n")


def test_the_engine_log_is_a_file_of_our_own(tmp_path, monkeypatch):
    """Not what somebody has put at a name that can be known; removed unless a failure has something to show."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "theirs").write_text("theirs")
    known = tmp_path / f"gemma4q-engine-{os.getpid()}.log"
    known.symlink_to(tmp_path / "theirs")
    with engine_log(None) as path:
        assert path.parent == tmp_path and path.name.startswith("gemma4q-engine-") and not path.is_symlink()
        assert path.stat().st_mode & 0o077 == 0
        path.write_text("a line")
    assert not path.exists()
    with pytest.raises(MeasuredError), engine_log(None) as path:
        raise MeasuredError
    assert not path.exists()
    with pytest.raises(MeasuredError), engine_log(None) as path:
        path.write_text("a line")
        raise MeasuredError
    assert path.read_text() == "a line"
    assert known.is_symlink() and (tmp_path / "theirs").read_text() == "theirs"
