"""Bad input through the command: one clear line on stderr, exit code 2, no output left behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import in_process
import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import small_config, write_checkpoint

GEMMA4Q = Path(sys.executable).with_name("gemma4q")
UP = "model.language_model.layers.1.mlp.up_proj.weight"


def quantize(source, target):
    return in_process.gemma4q("quantize", source, target, "--scheme", "quark-int8")


def assert_refused(result, *words):
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def edit_tensors(source, edit):
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def edit_config(source, **changes):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))


def truncate(source):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def put(name, row, column, value):
    def edit(tensors):
        tensors[name][row, column] = value

    return lambda source: edit_tensors(source, edit)


def replace(name, make):
    return lambda source: edit_tensors(source, lambda tensors: tensors.update({name: make(tensors[name])}))


CASES = {
    "truncated shard": (truncate, ["model.safetensors", "truncated"]),
    "no configuration": (lambda source: (source / "config.json").unlink(), ["config.json", "cannot be read"]),
    "not JSON": (lambda source: (source / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
    "another model": (lambda source: edit_config(source, model_type="llama"), ["llama", "expected one of", "gemma4"]),
    "sizes of another model": (
        lambda source: edit_config(source, text_config=small_config(hidden_size=128)["text_config"]),
        ["model.language_model.embed_tokens.weight", "got shape [256, 64]", "expected [256, 128]"],
    ),
    "missing tensor": (
        lambda source: edit_tensors(source, lambda tensors: tensors.pop(UP)),
        [UP, "missing", "[96, 64]"],
    ),
    "NaN": (put(UP, 17, 3, float("nan")), [UP, "NaN", "[17, 3]"]),
    "infinity": (put(UP, 95, 63, float("-inf")), [UP, "infinite", "[95, 63]"]),
    "int8 weight": (replace(UP, lambda weight: weight.to(torch.int8)), [UP, "got I8", "BF16"]),
    "fp8 weight": (replace(UP, lambda weight: weight.to(torch.float8_e4m3fn)), [UP, "got F8_E4M3", "BF16"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_source(tmp_path, case):
    damage, words = CASES[case]
    source = write_checkpoint(tmp_path / "source", small_config())
    damage(source)
    assert_refused(quantize(source, tmp_path / "target"), *words)
    assert not (tmp_path / "target").exists()


def test_nan_in_a_fused_expert_names_tensor_and_row(tmp_path):
    source = write_checkpoint(tmp_path / "source", small_config(moe=True))
    name = "model.language_model.layers.2.experts.gate_up_proj"
    edit_tensors(source, lambda tensors: tensors[name][3, 40].fill_(float("nan")))
    assert_refused(quantize(source, tmp_path / "target"), name, "from row 224", "64 NaN", "[8, 0]")


def test_unknown_scheme_and_size(tmp_path):
    source = write_checkpoint(tmp_path / "source", small_config())
    result = in_process.gemma4q("quantize", source, "x", "--scheme", "int3")
    assert result.returncode == 2
    assert "quark-int8" in result.stderr
    words = ["quantize", source, tmp_path / "x", "--scheme", "quark-int8", "--max-shard-size", "many"]
    assert_refused(in_process.gemma4q(*words), "'many'", "5GB")


def test_target_below_a_file(tmp_path):
    source = write_checkpoint(tmp_path / "source", small_config())
    (tmp_path / "file").write_text("")
    assert_refused(quantize(source, tmp_path / "file" / "target"), "cannot be written", "Not a directory")


@pytest.mark.parametrize(("options", "words"), [("size=200k", ["bytes free", "output needs"]), ("ro", ["Read-only"])])
def test_full_or_read_only_disk(tmp_path, options, words):
    """A real file system of that kind, in a mount namespace of its own."""
    source = write_checkpoint(tmp_path / "source", small_config())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o {options} tmpfs {disk}"
    script = f"{mount} && {GEMMA4Q} quantize {source} {disk}/target --scheme quark-int8; c=$?; ls -A {disk}; exit $c"
    command = [shutil.which("unshare"), "--mount", "--map-root-user", "sh", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_refused(result, *words)
    assert result.stdout == ""
