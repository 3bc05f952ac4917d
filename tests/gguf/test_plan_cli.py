"""`gguf-mixed plan --recipe optimal`: what is recorded of a plan, and one line for everything it refuses."""

import contextlib
import json
import re
import struct
from functools import partial

import in_process
import numpy as np
import pytest
from gemma4q_kernels.ggml import GGMLQuantizationType
from gguf_files import BF16, write_gguf
from quantize_runs import with_imatrices
from safetensors.numpy import save_file

from gguf_mixed.error_cache import ErrorCache
from gguf_mixed.fisher import Fisher, Marginals, write_fisher
from gguf_mixed.recipes.base import quantizable
from gguf_mixed.sensitivity import rows_of_matrix
from gguf_mixed.tensors import read_inventory

Q4_0, EMBEDDINGS = GGMLQuantizationType.Q4_0, "token_embd.weight"


def marginals_of(inventory, extra_rows=0):
    return {
        tensor.name: Marginals(
            np.ones((tensor.n_matrices, rows_of_matrix(tensor) + extra_rows), np.float32),
            np.ones((tensor.n_matrices, tensor.row_length), np.float32),
        )
        for tensor in quantizable(inventory)
    }


def measured(folder, name, names, **rows):
    """A table of measured divergences, one number for all tensors at each type."""
    lines = [f"{qtype},{','.join([str(value)] * len(names))}" for qtype, value in rows.items()]
    (folder / name).write_text("\n".join([f"QTYPE,{','.join(names)}", *lines]) + "\n")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The small model, what belongs to it, and what is damaged or of another."""
    folder = with_imatrices(tmp_path_factory.mktemp("plan"))
    inventory = read_inventory(folder / "model.gguf")
    content, start = (folder / "model.gguf").read_bytes(), inventory.headers[0].data_start
    (folder / "header.gguf").write_bytes(content[:start])
    (folder / "cut.gguf").write_bytes(content[:-40])
    (folder / "cut-header.gguf").write_bytes(content[: start // 2])
    (folder / "count.gguf").write_bytes(content[:8] + struct.pack("<Q", 2**62) + content[16:])
    (folder / "text.gguf").write_text("no model")
    write_gguf(folder / "other.gguf", [("blk.0.x.weight", (256, 2), BF16)])
    whole = marginals_of(inventory)
    write_fisher(folder / "fisher.safetensors", Fisher(whole, 7))
    write_fisher(folder / "rows.safetensors", Fisher(marginals_of(inventory, 1), 7))
    write_fisher(folder / "other.safetensors", Fisher(marginals_of(read_inventory(folder / "other.gguf")), 7))
    (folder / "cut.safetensors").write_bytes((folder / "fisher.safetensors").read_bytes()[:-4])
    save_file({"x": np.ones(3, np.float32)}, folder / "random.safetensors")
    measured(folder, "clear.csv", list(whole), q8_0=0.001, q4_k=0.2)
    measured(folder, "noise.csv", list(whole), q8_0=0.1, q4_k=0.2)
    return folder


@pytest.fixture
def run(files, monkeypatch):
    """The command as its entry point runs it, in the folder of the files: exit code, standard output and errors."""

    monkeypatch.chdir(files)
    yield partial(in_process.run, "gguf-mixed", "plan", "-o", "out.txt")
    for path in files.glob("out.txt*"):
        path.unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("text.gguf --bpw 5", "text.gguf: not a GGUF file: it does not start with GGUF"),
        ("nothing.gguf --bpw 5", "nothing.gguf: cannot be read: No such file or directory"),
        ("cut.gguf --bpw 5", "cut.gguf: truncated: tensor blk.1.one_row.weight ends at byte "),
        ("cut-header.gguf --bpw 5", "cut-header.gguf: truncated or damaged: "),
        ("count.gguf --bpw 5", "count.gguf: truncated or damaged: 4611686018427387904 tensors cannot fit in the "),
        ("other.gguf --bpw 5 --imatrix imatrix.gguf", "imatrix is of another model: other.gguf has no tensor blk.0."),
        ("other.gguf --bpw 5 --imatrix imatrix.dat", "imatrix is of another model: other.gguf has no tensor blk.0."),
        ("model.gguf --bpw 9 --imatrix model.gguf", "model.gguf: not an imatrix: general.type is None"),
        ("model.gguf --bpw 9 --imatrix clear.csv", "clear.csv: not an imatrix: "),
        ("model.gguf --bpw 9 --sensitivity other.safetensors", "Fisher file is of another model: nothing for tensor t"),
        ("model.gguf --bpw 9 --sensitivity rows.safetensors", "sensitivity is of another model: tensor token_embd.w"),
        ("model.gguf --bpw 9 --sensitivity cut.safetensors", "cut.safetensors: cannot be read as a Fisher file: "),
        ("model.gguf --bpw 9 --sensitivity random.safetensors", "random.safetensors: got format None, expected gguf-"),
        ("model.gguf --bpw 9 --sensitivity none.safetensors", "none.safetensors: cannot be read as a Fisher file: "),
        ("header.gguf --bpw 9 --sensitivity fisher.safetensors", "header.gguf: holds no weights, only a header: sens"),
        ("model.gguf --bpw 9 --sensitivity noise.csv", "noise.csv: median divergence 0.2 at the coarsest type and 0.1"),
        ("model.gguf --bpw 9 --sensitivity imatrix.csv", "imatrix.csv: cannot be read: "),
        ("model.gguf --bpw 9 --sensitivity guess", "sensitivity guess: expected a Fisher file (.safetensors), diver"),
        ("model.gguf --bpw 9 --types q4_k,q99", "'q99' is not a type a model can be quantized to, expected one of Q"),
        (
            "model.gguf --bpw 9 --types iq2_s",
            "tensor blk.0.ffn_up.weight: none of the types asked for can store rows of",
        ),
        ("model.gguf --bpw 9 --backend tpu", "backend tpu: unknown, expected one of cpu, cuda, hip, vulkan"),
        ("model.gguf --bpw 9 --backend cpu --types iq3_s", "backend cpu: fast at none of iq3_s"),
        ("model.gguf --bpw 9 --pin nothing=q4_0", "pattern nothing: matches no tensor"),
        ("model.gguf --bpw 9 --floor (=4", "pattern (: not a regular expression: "),
        ("model.gguf --bpw 9 --uniform zzz", "pattern zzz: matches no tensor"),
        ("model.gguf --bpw 9 --pin attn_k", "--pin attn_k: expected REGEX=VALUE"),
        ("model.gguf --bpw 9 --pin attn_k=q4", "'q4' is not a type a model can be quantized to"),
        ("model.gguf --bpw 9 --floor attn_k=some", "--floor some: expected bits a weight"),
        ("model.gguf --bpw 9 --floor attn_k=99", "tensor blk.0.attn_k.weight: none of Q4_0, "),
        ("model.gguf --bpw 9 --size 1GB", "budget: expected either bits a weight or a size, and not both"),
        ("model.gguf", "budget: expected either bits a weight or a size, and not both"),
        ("model.gguf --bpw inf", "budget: got inf bits a weight, expected more than 0 and at most 64"),
        ("model.gguf --size 1XB", "size '1XB': expected a positive number with a unit, such as 14GiB or 9.8GB"),
        ("model.gguf --size 0", "size '0': expected a positive number with a unit"),
        ("model.gguf --bpw 1", "budget: got 1 bpw, expected 4.901 bpw (the least possible) to 16.444 bpw (the most)"),
        ("model.gguf --size 1kB", "budget: got a file of 1,000 bytes, expected a file of 92,480 bytes (the least pos"),
    ],
)
def test_refused_in_one_line_before_anything_is_measured(run, files, arguments, message):
    code, output, errors = run("--recipe", "optimal", *arguments.split())
    assert (code, output) == (2, "")
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1
    assert not list(files.glob("out.txt*"))


@pytest.mark.parametrize(
    "option", ["--bpw 5", "--size 1GB", "--types q4_k", "--backend cpu", "--pin a=q4_k", "--floor a=4", "--uniform a"]
)
def test_a_fixed_recipe_takes_no_demands(run, option):
    code, _, errors = run("model.gguf", "--recipe", "uniform-q8_0", *option.split())
    name = option.split()[0]
    assert (code, errors) == (
        2,
        f"error: {name}: recipe uniform-q8_0 is a fixed rule, expected --recipe optimal with it\n",
    )


def sidecar(files):
    return json.loads((files / "out.txt.json").read_text())


def test_measured_errors_are_recorded(run, files, tmp_path):
    arguments = ["model.gguf", "--recipe", "optimal", "--bpw", 9, "--types", "q4_0,q8_0", "--rows", 4, "--threads", 1]
    code, output, errors = run(*arguments, "--cache", tmp_path / "errors.jsonl")
    assert (code, errors) == (0, "note: sensitivity is role prior, not measured on this model\n")
    assert "errors of types: measured, 4 rows a tensor" in output
    assert (sidecar(files)["errors"], sidecar(files)["predicted"]["divergence"]) == ("measured, 4 rows a tensor", None)
    code, output, errors = run(*arguments, "--cache", tmp_path / "errors.jsonl", "--sensitivity", "fisher.safetensors")
    assert (code, errors) == (0, "") and "predicted divergence: " in output
    assert sidecar(files)["predicted"]["divergence"] > 0


def test_a_header_is_planned_from_the_prior(run, files):
    """With measured sensitivities too; what that adds up to is no measured divergence, and not called one."""
    arguments = ["header.gguf", "--recipe", "optimal", "--size", "150kB", "--sensitivity", "clear.csv"]
    code, output, errors = run(*arguments)
    assert (code, errors) == (0, "note: errors of types are a prior: the file holds no weights, only a header\n")
    assert "errors of types: prior: no weights in the file" in output and "divergence" not in output
    content = sidecar(files)
    assert (content["errors"], content["predicted"]["divergence"]) == ("prior: no weights in the file", None)
    assert content["sensitivity"] == "measured at Q4_K (clear.csv)"
    assert 140_000 < content["predicted"]["file_bytes"] <= 150_000


def test_a_fixed_recipe_looks_at_no_errors(run, files):
    assert run("model.gguf", "--recipe", "uniform-q8_0")[0] == 0
    assert (sidecar(files)["errors"], sidecar(files)["sensitivity"]) == (None, "none: the recipe is a fixed rule")


def test_a_pinned_type_is_for_what_is_pinned_alone(run, files, tmp_path):
    """At a size that has room for it everywhere."""
    arguments = ["--recipe", "optimal", "--bpw", 9, "--rows", 4, "--cache", tmp_path / "errors.jsonl"]
    tensors = quantizable(read_inventory(files / "model.gguf"))
    expected = {tensor.name: tensor.written_type(Q4_0).name.lower() for tensor in tensors} | {EMBEDDINGS: "q6_k"}
    for source in ("model.gguf", "header.gguf"):
        code, _, errors = run(source, *arguments, "--types", "q4_0", "--pin", "token_embd=q6_k")
        assert code == 0, errors
        found = sidecar(files)["types"]
        assert {name: found[name] for name in expected} == expected
    rows = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()[1:]]
    assert {row["tensor"] for row in rows if "Q6_K" in row["sums"]} == {EMBEDDINGS}


def test_without_a_place_for_the_cache(run, files, tmp_path, monkeypatch):
    """The default one is done without; one that is named is an error."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    arguments = ["model.gguf", "--recipe", "optimal", "--bpw", 9, "--types", "q4_0,q8_0", "--rows", 4]
    code, _, errors = run(*arguments, "--sensitivity", "fisher.safetensors")
    assert (code, errors.count("\n")) == (0, 1)
    assert errors.startswith(f"note: measured errors are not kept, unless with --cache FILE: {tmp_path / 'file'}/")
    code, output, errors = run(*arguments, "--sensitivity", "fisher.safetensors", "--cache", tmp_path / "file" / "x")
    assert (code, output) == (2, "")
    assert errors.startswith(f"error: {tmp_path / 'file' / 'x'}: cannot be written: ") and errors.count("\n") == 1


def test_another_run_with_the_default_cache(run, files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["model.gguf", "--recipe", "optimal", "--bpw", 9, "--types", "q4_0,q8_0", "--rows", 4]
    arguments += ["--sensitivity", "fisher.safetensors"]
    assert run(*arguments)[0] == 0
    (cache,) = tmp_path.rglob("*.jsonl")
    with contextlib.closing(ErrorCache(cache)):
        code, _, errors = run(*arguments)
        assert (code, errors.count("\n")) == (0, 1)
        assert errors.startswith(f"note: measured errors are not kept, unless with --cache FILE: {cache}: another run")
        code, output, errors = run(*arguments, "--cache", cache)
        assert (code, output) == (2, "") and errors.startswith(f"error: {cache}: another run")


@pytest.mark.parametrize("source", ["model.gguf", "header.gguf"])
def test_a_pinned_type_that_rows_do_not_fit(source, run, files, tmp_path):
    """As llama-quantize and all recipes do: what falls back is written in its place, and told."""
    tensors = read_inventory(files / "model.gguf").tensors
    name = next(name for name, tensor in tensors.items() if not tensor.kept_because and tensor.row_length % 256)
    written = tensors[name].written_type(GGMLQuantizationType.Q4_K).name.lower()
    arguments = ["--recipe", "optimal", "--bpw", 9, "--rows", 4, "--cache", tmp_path / "errors.jsonl"]
    code, _, errors = run(source, *arguments, "--types", "q8_0", "--pin", f"^{re.escape(name)}$=q4_k")
    assert code == 0, errors
    content = sidecar(files)
    assert (content["types"][name], written != "q4_k") == (written, True)
    assert {"tensor": name, "requested": "q4_k", "written": written} in content["fallbacks"]


def test_the_least_that_a_message_names_is_accepted(run, files):
    arguments = ["header.gguf", "--recipe", "optimal"]
    for types in ("q8_0", "q5_0", "q6_k,q5_1", "q4_1,q8_0"):
        code, _, errors = run(*arguments, "--bpw", 1, "--types", types)
        least = re.search(r"expected ([\d.]+) bpw \(the least possible\)", errors)[1]
        assert code == 2
        code, _, errors = run(*arguments, "--bpw", least, "--types", types)
        assert code == 0, errors
