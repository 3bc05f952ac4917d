"""`gguf-mixed inspect` and `gguf-mixed imatrix` as a user runs them."""

import json
import subprocess
import sys

import pytest
from gguf_files import gemma4_metadata, moe_26b_a4b, write_gguf
from llama_quantize import imatrix_of, small_model

from gguf_mixed.errors import InputError
from gguf_mixed.imatrix_gguf import write_imatrix
from gguf_mixed.imatrix_legacy import write_legacy
from gguf_mixed.llama_cpp import find_tool
from gguf_mixed.roles import group_by_role
from gguf_mixed.tensors import read_inventory


def gguf_mixed(*arguments, **options):
    command = [sys.executable, "-m", "gguf_mixed.cli", *map(str, arguments)]
    environment = {"COLUMNS": "160", "PATH": "", **options}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_gguf(folder / "26b.gguf", moe_26b_a4b(), gemma4_metadata(30, 2816, 2112, 128))
    inventory = read_inventory(small_model(folder))
    write_imatrix(imatrix_of(inventory), folder / "imatrix.gguf")
    write_legacy(imatrix_of(inventory), folder / "imatrix.dat")
    return folder


def test_inspect_lists_what_is_legal_and_what_is_replaced(folder):
    finished = gguf_mixed("inspect", folder / "26b.gguf")
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in finished.stdout.splitlines()]
    assert "ffn_gate_up_exps 30 2816x1408x128 BF16 30.5 GB 16.000 any type" in lines
    assert "ffn_down_exps 30 704x2816x128 BF16 15.2 GB 16.000 see below" in lines
    assert "ffn_gate_inp 30 2816x128 F32 43.3 MB 32.000 kept: name" in lines
    assert "output_norm 1 2816 F32 11.3 kB 32.000 kept: 1-D" in lines
    types = "MXFP4 Q4_0 IQ4_NL NVFP4 Q4_1 Q5_0 Q5_1 Q8_0 F16 BF16 F32"
    assert f"ffn_down_exps (704), ffn_down (2112) can be {types}" in lines
    assert "ffn_down_exps 704 Q6_K Q8_0 8.500 8.1 GB" in lines
    assert "ffn_down 2112 Q4_K Q5_0 5.500 122.7 MB" in lines
    assert "658 tensors, 25,233,142,046 parameters, 50.5 GB, 16.007 bpw" in lines


def test_inspect_fits_a_pipe(folder):
    """Where rich takes 80 columns: nothing is cut, and no role takes more lines than it has shapes."""
    finished = gguf_mixed("inspect", folder / "26b.gguf", COLUMNS="80")
    table = finished.stdout[: finished.stdout.index("ffn_down_exps (704)")].splitlines()
    assert "…" not in finished.stdout and max(map(len, table)) <= 80
    shapes = [group.shapes for group in group_by_role(read_inventory(folder / "26b.gguf"))]
    assert len(table) == 3 + sum(map(len, shapes))


def test_inspect_json(folder):
    finished = gguf_mixed("inspect", folder / "26b.gguf", "--json")
    assert (finished.returncode, finished.stderr) == (0, "")
    report = json.loads(finished.stdout)
    assert report["file_bytes"] == (folder / "26b.gguf").stat().st_size
    assert sum(role["bytes"] for role in report["roles"]) == report["tensor_bytes"]
    down = next(role for role in report["roles"] if role["role"] == "ffn_down_exps.weight")
    assert (down["shapes"], down["types"]) == ([[704, 2816, 128]], {"bf16": 30})
    replaced = {item["requested"]: (item["written"], item["bpw"]) for item in down["fallbacks"]}
    assert (replaced["iq3_s"], replaced["q6_k"]) == (("iq4_nl", 4.5), ("q8_0", 8.5))
    assert report["imatrix"] is None


def test_inspect_with_an_imatrix(folder):
    finished = gguf_mixed("inspect", folder / "model.gguf", "--imatrix", folder / "imatrix.gguf")
    assert finished.stdout.splitlines()[-1].endswith("imatrix.gguf: of this model; tensors without data: none")
    report = json.loads(
        gguf_mixed("inspect", folder / "model.gguf", "--imatrix", folder / "imatrix.dat", "--json").stdout
    )
    assert report["imatrix"] == {"without_data": []}


def test_imatrix_names_experts_that_were_never_visited(folder):
    finished = gguf_mixed("imatrix", folder / "imatrix.gguf")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "11 entries, 7 chunks of 512 tokens" in finished.stdout
    assert "computed on: calibration.txt\ncomputed on: other.txt" in finished.stdout
    lines = [" ".join(line.replace("│", " ").split()) for line in finished.stdout.splitlines()]
    assert "blk.1.ffn_down_exps.weight 3 0 7 14 0" in lines


def test_imatrix_json(folder):
    report = json.loads(gguf_mixed("imatrix", folder / "imatrix.gguf", "--json").stdout)
    assert report["entries"]["blk.0.ffn_down_exps.weight"] == {"values": 2112, "counts": [0, 7, 14], "never_used": [0]}
    assert (report["legacy"], report["chunk_count"], report["chunk_size"]) == (False, 7, 512)


def test_a_legacy_imatrix_says_what_it_cannot_tell(folder):
    assert "those of single experts are lost" in gguf_mixed("imatrix", folder / "imatrix.dat").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nothing.gguf"], "nothing.gguf: cannot be read: No such file or directory"),
        (["inspect", "imatrix.dat"], "imatrix.dat: not a GGUF file"),
        (
            ["inspect", "26b.gguf", "--imatrix", "imatrix.gguf"],
            "imatrix is of another model: tensor blk.0.attn_k.weight",
        ),
        (["imatrix", "model.gguf"], "model.gguf: not an imatrix: general.type is None"),
    ],
)
def test_errors_are_one_line(folder, arguments, message):
    arguments = [folder / item if item.endswith((".gguf", ".dat")) else item for item in arguments]
    finished = gguf_mixed(*arguments, "--json")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1
    assert message in finished.stderr
    assert "Traceback" in gguf_mixed(*arguments, "--debug").stderr


def make_tool(folder, name="llama-quantize"):
    folder.mkdir(parents=True)
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)
    return folder / name


@pytest.mark.parametrize("below", ["", "bin", "build/bin"])
def test_a_named_folder_is_the_only_place_looked_at(tmp_path, monkeypatch, below):
    monkeypatch.setenv("PATH", str(make_tool(tmp_path / "path").parent))
    with pytest.raises(InputError, match="llama-quantize: not in .*named, nor in bin or build/bin below it"):
        find_tool("llama-quantize", tmp_path / "named")
    tool = make_tool(tmp_path / "named" / below)
    assert find_tool("llama-quantize", tmp_path / "named") == tool


def test_path_comes_before_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        InputError, match="llama-quantize: not on PATH and not in .*; name its folder with --llama-cpp DIR"
    ):
        find_tool("llama-quantize")
    cached = make_tool(tmp_path / "gemma4q" / "llama.cpp" / "build" / "bin")
    assert find_tool("llama-quantize") == cached
    on_path = make_tool(tmp_path / "path")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert find_tool("llama-quantize") == on_path
