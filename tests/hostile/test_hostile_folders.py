"""Folders that are hostile by what is in them: links, pipes, files without an end, code beside the weights."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from hostile.test_hostile_corpus import DENSE, run
from synthetic import small_config, write_checkpoint

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.header import read_header, read_json
from vllm_gemma4q.checkpoint.sidecars import sidecars
from vllm_gemma4q.errors import InputError

MARKER = "code-of-the-checkpoint-ran"
CLASSES = ("Config", "Model", "ModelForCausalLM", "ModelForImageTextToText", "Tokenizer", "Processor", "ImageProcessor")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "source", small_config())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_pipe_is_refused_and_not_waited_for(checkpoint, name):
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    with pytest.raises(InputError, match=f"{name}: not a file"):
        open_checkpoint(checkpoint)


def test_a_link_to_a_secret_is_not_copied(checkpoint, tmp_path, capsys, monkeypatch):
    """What an unpacked archive may hold: a tokenizer that is a link to somebody's key."""
    (tmp_path / "secret").write_text("key")
    (checkpoint / "vocab.txt").symlink_to(tmp_path / "secret")
    made = tmp_path / "made"
    code, out, err = run("gemma4q", "quantize", checkpoint, made, "--scheme", "quark-int8")
    assert (code, out) == (2, "") and not made.exists()
    assert err.startswith(f"error: vocab.txt: a link to {tmp_path / 'secret'}, expected a file in {checkpoint}")


def test_links_of_the_hub_cache_are_its_files(checkpoint):
    """snapshots/COMMIT/FILE -> ../../blobs/HASH, and links within a folder."""
    blobs, snapshot = checkpoint / "blobs", checkpoint / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    (snapshot / "merges.txt").symlink_to("tokenizer.json")
    assert [path.name for path in sidecars(snapshot)] == ["merges.txt", "tokenizer.json"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_without_an_end_is_not_read(checkpoint, name):
    """40 GB of hole, which take no disk."""
    os.truncate(checkpoint / name, 40_000_000_000) if (checkpoint / name).exists() else None
    with (checkpoint / name).open("ab") as file:
        file.truncate(40_000_000_000)
    with pytest.raises(InputError, match=rf"{name}: 40,000,000,000 bytes, expected at most"):
        read_json(checkpoint / name) if name == "config.json" else sidecars(checkpoint)


def test_a_header_of_millions_of_values_is_not_parsed(tmp_path):
    """Each of the empty lists would take 64 bytes for its 3."""
    header = b'{"a":[' + b"[]," * 3_000_000 + b"[]]}"
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match=r"model.safetensors: header is not valid JSON: more than 1,200,000 values"):
        read_header(path)


@pytest.fixture
def with_code(tmp_path) -> Path:
    """The small model, beside code under every name by which it could be taken for the model's or for a library."""
    folder = tmp_path / "with-code"
    shutil.copytree(DENSE, folder, copy_function=os.link)
    code = f"from pathlib import Path\nPath({str(tmp_path / MARKER)!r}).touch()\nclass Evil: pass\n"
    for name in (
        "modeling_evil",
        "modeling_gemma4",
        "configuration_gemma4",
        "tokenization_evil",
        "torch",
        "sitecustomize",
    ):
        (folder / f"{name}.py").write_text(code)
    auto_map = {f"Auto{name}": "modeling_evil.Evil" for name in CLASSES} | {
        "AutoTokenizer": ["modeling_evil.Evil", None]
    }
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"):
        content = {**json.loads((folder / name).read_text()), "auto_map": auto_map}
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(content))
    return folder


def test_no_command_runs_code_of_a_checkpoint(with_code, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(with_code)
    before = set(sys.modules)
    code, out, _ = run("gemma4q", "doctor", with_code)
    assert code == 0 and "note  remote-code  config.json (and 9 more): got code" in out
    made = tmp_path / "made"
    code, _, err = run("gemma4q", "quantize", with_code, made, "--scheme", "quark-int8")
    assert code == 0, err
    assert not list(made.rglob("*.py")) and not (tmp_path / MARKER).exists()
    assert not {name for name in set(sys.modules) - before if "evil" in name.lower()}


@pytest.mark.slow
def test_no_loader_of_transformers_runs_code_of_a_checkpoint(with_code, tmp_path, capsys, monkeypatch):
    """Calibrating loads tokenizer and configuration, evaluating the tokenizer, through the same function."""
    from transformers import AutoTokenizer

    from vllm_gemma4q.calibration.texts import load_tokenizer

    monkeypatch.chdir(with_code)
    assert load_tokenizer(with_code).encode("a")
    text = tmp_path / "text.txt"
    text.write_text("A calibration of one sample. " * 200)
    words = ["gemma4q", "calibrate", with_code, tmp_path / "statistics", "--text", text, "--samples", "1"]
    code, _, err = run(*words, "--max-length", "64")
    assert code == 0, err
    settings = json.loads((with_code / "tokenizer_config.json").read_text())
    (with_code / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "Evil"}))
    with pytest.raises(
        InputError, match=r"cannot load the tokenizer: it is code of the checkpoint's, which is never run"
    ):
        load_tokenizer(with_code)
    assert not (tmp_path / MARKER).exists()
    with contextlib.suppress(Exception):  # what it is: this is how users run it who are told to trust
        AutoTokenizer.from_pretrained(with_code, trust_remote_code=True)
    assert (tmp_path / MARKER).exists()
