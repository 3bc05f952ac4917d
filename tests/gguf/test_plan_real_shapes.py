"""`gguf-mixed plan` on real shapes of Gemma 4, of which only headers are here: the best plan for rank15's bytes."""

import json
import subprocess

import pytest
from gemma4q_kernels.ggml import block_size
from gguf_files import REAL_31B, gemma4_metadata, moe_26b_a4b, real_31b, write_gguf
from llama_quantize import types_of_dry_run
from quantize_runs import ok
from test_recipes import imatrix

from gguf_mixed.imatrix_gguf import read_imatrix, write_imatrix
from gguf_mixed.overrides import read_overrides
from gguf_mixed.quantize import Job, build_command
from gguf_mixed.tensors import read_inventory

REAL = {
    "26B-A4B": (moe_26b_a4b, (30, 2816, 2112, 128)),
    "31B": (real_31b, (60, 5376, 21504)),
}
PUBLISHED_BPW = 3.98  # of rank15 on the 31B, from a card that rounds


@pytest.fixture(
    scope="module",
    params=[
        "26B-A4B",
        pytest.param("31B", marks=pytest.mark.skipif(not REAL_31B.exists(), reason=f"{REAL_31B.name} is not here")),
    ],
)
def planned(request, tmp_path_factory):
    """A folder with `sparse.gguf`, its header alone, an imatrix, and rank15's plan and ours for rank15's bytes."""
    folder = tmp_path_factory.mktemp("real")
    listed, shape = REAL[request.param]
    inventory = read_inventory(write_gguf(folder / "sparse.gguf", listed(), gemma4_metadata(*shape)))
    with (folder / "sparse.gguf").open("rb") as file:
        (folder / "model.gguf").write_bytes(file.read(inventory.headers[0].data_start))
    write_imatrix(imatrix(inventory, lambda tensor: 1 + (tensor.layer or 0)), folder / "imatrix.gguf")
    (folder / "name").write_text(request.param)
    theirs = plan(folder, "rank15")
    plan(folder, "optimal", "--size", json.loads(theirs.stdout)["predicted"]["file_bytes"])
    return folder


def plan(folder, recipe, *arguments):
    """Without any llama.cpp: a header needs none."""
    command = ["plan", folder / "model.gguf", "--recipe", recipe, "--imatrix", folder / "imatrix.gguf", "--json"]
    return ok(*command, "-o", folder / f"{recipe}.txt", *arguments, XDG_CACHE_HOME=str(folder / "no-cache"))


def sidecar(folder, recipe):
    return json.loads((folder / f"{recipe}.txt.json").read_text())


def test_the_plan_lands_just_under_the_bytes_of_rank15(planned):
    theirs, ours = sidecar(planned, "rank15"), sidecar(planned, "optimal")
    if (planned / "name").read_text() == "31B":
        assert abs(theirs["predicted"]["bpw"] / PUBLISHED_BPW - 1) < 0.015
    wanted = theirs["predicted"]["file_bytes"]
    assert 0.999 * wanted < ours["predicted"]["file_bytes"] <= wanted
    assert (ours["errors"], theirs["errors"]) == ("prior: no weights in the file", None)
    assert (ours["sensitivity"], ours["predicted"]["divergence"]) == ("role prior", None)
    assert ours["arguments"]["gap"] < 0.001


def test_rows_of_704_and_2112_get_types_that_fit(planned):
    """Ours asks for what will be written; rank15's substitutes are listed, each with what was asked for."""
    theirs, ours = sidecar(planned, "rank15"), sidecar(planned, "optimal")
    table = read_overrides(planned / "optimal.txt").types
    tensors = read_inventory(planned / "model.gguf").tensors
    odd = {name for name in table if tensors[name].row_length % 256}
    assert ours["fallbacks"] == [] and {block_size(table[name]) for name in odd} <= {32}
    replaced = {item["tensor"]: (item["requested"], item["written"]) for item in theirs["fallbacks"]}
    assert set(replaced.values()) <= {("iq3_s", "iq4_nl")} and set(replaced) <= odd
    if (planned / "name").read_text() == "26B-A4B":
        assert len(odd) == 60 and replaced


def test_the_plan_is_explained(planned):
    """A line a role: types, size, bits, and its share of the expected loss, which adds up."""
    size = sidecar(planned, "rank15")["predicted"]["file_bytes"]
    command = ["plan", planned / "model.gguf", "--recipe", "optimal", "--size", size, "-o", planned / "again.txt"]
    finished = ok(*command, "--imatrix", planned / "imatrix.gguf", COLUMNS="80")
    lines = [" ".join(line.replace("│", " ").split()) for line in finished.stdout.splitlines()]
    shares = [float(line.split()[-1][:-1]) for line in lines if line.endswith("%")]
    assert len(shares) > 8 and abs(sum(shares) - 100) < 0.05 * len(shares) + 1e-9
    assert "errors of types: prior: no weights in the file" in lines
    assert "rows that do not fit what the recipe asks for: none" in lines
    assert "note: errors of types are a prior: the file holds no weights, only a header\n" in finished.stderr
    assert (planned / "again.txt").read_bytes() == (planned / "optimal.txt").read_bytes()


@pytest.mark.parametrize("recipe", ["rank15", "optimal"])
def test_llama_quantize_would_write_it(llama_quantize, planned, recipe):
    data = planned / "imatrix.gguf"
    table = planned / f"{recipe}.txt"
    job = Job(read_inventory(planned / "sparse.gguf"), read_overrides(table), read_imatrix(data), data)
    command = build_command(llama_quantize, job, table, planned / "out.gguf", threads=1)
    finished = subprocess.run([command[0], "--dry-run", *command[1:]], capture_output=True, text=True, check=True)
    log = finished.stdout + finished.stderr
    assert types_of_dry_run(log) == job.written
    predicted = sidecar(planned, recipe)["predicted"]
    assert (job.file_bytes, job.tensor_bytes) == (predicted["file_bytes"], predicted["tensor_bytes"])
    assert f"quant size  = {job.tensor_bytes / 2**20:8.2f} MiB" in log
    assert "falling back" not in log and not (planned / "out.gguf").exists()
