"""`gguf-mixed sweep` without a text: plans, predictions, what is refused. No llama.cpp is needed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from gguf_files import gemma4_metadata, moe_26b_a4b, write_gguf
from quantize_runs import ok, with_imatrices
from test_gguf_cli import gguf_mixed

from gguf_mixed.errors import InputError
from gguf_mixed.fisher import Fisher, Marginals, write_fisher
from gguf_mixed.sensitivity import rows_of_matrix
from gguf_mixed.sweep_tiers import DEFAULT_BPW, DEFAULT_MIXES, parse_tiers
from gguf_mixed.tensors import read_inventory

BPW, FIXED = "5,6,8", "uniform-q4_1,optimal@uniform-q4_1,rank15,uniform-tq2_0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, an importance matrix, and a Fisher file whose last layer counts most."""
    folder = with_imatrices(tmp_path_factory.mktemp("sweep"))
    marginals = {}
    for tensor in read_inventory(folder / "model.gguf").tensors.values():
        if not tensor.kept_because:
            each = np.full((tensor.n_matrices, rows_of_matrix(tensor)), 1.0 + 9 * (tensor.layer or 0), np.float32)
            columns = np.full((tensor.n_matrices, tensor.row_length), each[0].sum() / tensor.row_length, np.float32)
            marginals[tensor.name] = Marginals(each, columns)
    write_fisher(folder / "fisher.safetensors", Fisher(marginals, 100))
    return folder


def arguments(folder, output, *more, bpw=BPW, tiers=FIXED):
    given = ["sweep", folder / "model.gguf", output, "--imatrix", folder / "imatrix.gguf", "--rows", 16]
    given += ["--sensitivity", folder / "fisher.safetensors", "--cache", folder / "cache", "--threads", 1]
    return [*given, "--bpw", bpw, "--tiers", tiers, *more]


def sweep(folder, output, *more, **options):
    return json.loads(ok(*arguments(folder, output, "--json", *more, **options)).stdout)


@pytest.fixture(scope="module")
def results(folder):
    return sweep(folder, folder / "out")


def by_name(results):
    return {entry["name"]: entry for entry in results["tiers"]}


def test_what_is_written(folder, results):
    names = {"optimal-5", "optimal-6", "optimal-8", "uniform-q4_1", "optimal@uniform-q4_1", "rank15", "uniform-tq2_0"}
    assert set(by_name(results)) == names
    files = {path.name for path in (folder / "out").iterdir()}
    tables = {f"{name}.txt{end}" for name in names for end in ("", ".json")}
    assert files == tables | {"results.json", "plot.png"}
    assert json.loads((folder / "out" / "results.json").read_text()) == results
    assert (folder / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [entry["file_bytes"] for entry in results["tiers"]] == sorted(e["file_bytes"] for e in results["tiers"])
    assert all(entry["measured"] is None for entry in results["tiers"])
    assert results["evaluation"] is None


def test_sizes_keep_to_the_budgets(folder, results):
    found = by_name(results)
    for bits in (5, 6, 8):
        assert 0.99 * bits < found[f"optimal-{bits}"]["bpw"] <= bits
    assert found["optimal@uniform-q4_1"]["file_bytes"] <= found["uniform-q4_1"]["file_bytes"]
    for name, entry in found.items():
        content = json.loads((folder / "out" / f"{name}.txt.json").read_text())
        assert content["predicted"]["file_bytes"] == entry["file_bytes"]
        assert content["predicted"]["divergence"] == entry["predicted"]


def test_predictions_of_fixed_recipes_are_of_the_same_table(folder, results):
    found = by_name(results)
    assert found["optimal-5"]["predicted"] > found["optimal-6"]["predicted"] > found["optimal-8"]["predicted"] > 0
    assert found["optimal@uniform-q4_1"]["predicted"] < found["uniform-q4_1"]["predicted"]
    assert (found["uniform-tq2_0"]["predicted"], found["uniform-tq2_0"]["not_in_error_table"]) == (None, ["TQ2_0"])
    assert found["uniform-q4_1"]["not_in_error_table"] == []


def test_a_sweep_is_what_plan_says(folder, results):
    common = ["--imatrix", folder / "imatrix.gguf", "--rows", 16, "--cache", folder / "cache"]
    common += ["--sensitivity", folder / "fisher.safetensors", "-o", folder / "plan.txt"]
    ok("plan", folder / "model.gguf", "--recipe", "optimal", "--bpw", 6, *common)
    assert (folder / "plan.txt").read_text() == (folder / "out" / "optimal-6.txt").read_text()
    planned = json.loads((folder / "plan.txt.json").read_text())
    assert planned["predicted"] == json.loads((folder / "out" / "optimal-6.txt.json").read_text())["predicted"]


def test_tables_say_what_is_predicted_and_what_is_not(folder, results):
    finished = ok(*arguments(folder, folder / "out"))
    lines = [" ".join(line.split()) for line in finished.stdout.splitlines()]
    for entry in results["tiers"]:
        (line,) = (line for line in lines if line.startswith(f"{entry['name']} "))
        predicted = "" if entry["predicted"] is None else f" {entry['predicted']:.4f}"
        assert line.endswith(f" {entry['bpw']:.3f}{predicted}")
    assert "uniform-tq2_0: not predicted: the error table has no TQ2_0" in lines
    assert finished.stderr == ""


def test_more_tiers_are_added_and_none_is_done_again(folder, results, tmp_path):
    first = sweep(folder, tmp_path, bpw="6", tiers="none")
    stamp = (tmp_path / "optimal-6.txt").stat().st_mtime_ns
    second = sweep(folder, tmp_path)
    assert (tmp_path / "optimal-6.txt").stat().st_mtime_ns == stamp
    assert second["tiers"] == results["tiers"]
    assert [entry["name"] for entry in first["tiers"]] == ["optimal-6"]


def test_default_tiers_that_are_impossible_are_left_out(folder, tmp_path):
    """This model's rows of 2112 keep it above four bits, and without llama.cpp there are no stock mixes."""
    (tmp_path / "no-llama").mkdir()
    given = arguments(folder, tmp_path / "out", "--json")
    for option in ("--bpw", "--tiers"):
        index = given.index(option)
        del given[index : index + 2]
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    found = json.loads(ok(*given, **environment).stdout)
    done, skipped = set(by_name(found)), found["skipped"]
    assert done | set(skipped) == {f"optimal-{b:g}" for b in DEFAULT_BPW} | {f"stock-{mix}" for mix in DEFAULT_MIXES}
    assert {"optimal-5", "optimal-6"} <= done
    assert "expected" in skipped["optimal-3"] and "the least possible" in skipped["optimal-3"]
    assert "llama-quantize: not on PATH" in skipped["stock-q4_k_m"]
    del given[given.index("--json")]
    assert "optimal-3: left out: budget: got 3 bpw" in ok(*given, **environment).stdout


def test_of_a_header_only_sizes_are_told(tmp_path):
    model = write_gguf(tmp_path / "26b.gguf", moe_26b_a4b(), gemma4_metadata(30, 2816, 2112, 128))
    os.truncate(model, read_inventory(model).headers[0].data_start)
    given = ["sweep", model, tmp_path / "out", "--bpw", "4,5", "--tiers", "uniform-q8_0"]
    finished = ok(*given, "--json")
    found = by_name(json.loads(finished.stdout))
    assert set(found) == {"optimal-4", "optimal-5", "uniform-q8_0"}
    assert all(entry["predicted"] is None for entry in found.values())
    assert found["optimal-5"]["bpw"] == pytest.approx(5, rel=1e-3) and found["optimal-5"]["bpw"] <= 5
    assert "role prior, not measured on this model" in finished.stderr and "only a header" in finished.stderr
    assert not (tmp_path / "out" / "plot.png").exists()
    finished = gguf_mixed(*given, "--text", "README.md")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "error: 26b.gguf: holds no weights, only a header: nothing to measure, so no --text\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--bpw", "1.5"], "budget: got 1.5 bpw, expected "),
        (["--bpw", "four"], "--bpw four: expected bits a weight"),
        (["--bpw", "none", "--tiers", "none"], "no tiers: name some with --tiers or --bpw"),
        (["--tiers", "q4_k_xxl"], "recipe q4_k_xxl: unknown"),
        (["--tiers", "optimal"], "--tiers optimal: at which size?"),
        (["--tiers", "optimal@best"], "recipe best: unknown"),
        (["--keep"], "--keep: files are written to be measured: --text FILE"),
        (["--types", "q2_k", "--tiers", "none", "--bpw", "5"], "another sweep, made with types"),
        (["--rows", "17"], "another sweep, made with rows 16, expected 17"),
        (["--sensitivity", "role-prior"], "another sweep, made with sensitivity fisher.safetensors ("),
    ],
)
def test_refusals_are_one_line(folder, results, given, message):
    finished = gguf_mixed(*arguments(folder, folder / "out"), *given)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1
    assert message in finished.stderr
    assert json.loads((folder / "out" / "results.json").read_text()) == results


def test_the_folder_of_another_model_is_refused(folder, results, tmp_path):
    """One weight differs: the header is the same."""
    model = tmp_path / "model.gguf"
    content = bytearray((folder / "model.gguf").read_bytes())
    content[read_inventory(folder / "model.gguf").tensors["blk.1.attn_k.weight"].start + 2] ^= 1
    model.write_bytes(content)
    given = arguments(folder, folder / "out")
    given[1] = model
    finished = gguf_mixed(*given)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "results.json: of another sweep, made with model model.gguf (" in finished.stderr


@pytest.mark.parametrize("content", ["", "[]", '{"format": "gguf-mixed sweep 1"}', '{"format": "gguf-mixed sweep 9"}'])
def test_results_that_are_not_ours_are_refused(folder, tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    finished = gguf_mixed(*arguments(folder, tmp_path))
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
    assert (tmp_path / "results.json").read_text() == content


def without_matplotlib(*given):
    program = "import sys; sys.modules['matplotlib'] = None; from gguf_mixed.cli import main; main()"
    return subprocess.run([sys.executable, "-c", program, *map(str, given)], capture_output=True, text=True)


def test_without_matplotlib_it_says_what_to_install(folder, tmp_path):
    finished = without_matplotlib(*arguments(folder, tmp_path))
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "error: matplotlib: not installed: pip install 'vllm-gemma4q[evaluate]', or --no-plot\n"
    assert not list(tmp_path.iterdir())
    finished = without_matplotlib(*arguments(folder, tmp_path, "--no-plot"))
    assert (finished.returncode, finished.stderr) == (0, "")
    assert not (tmp_path / "plot.png").exists()


def test_names_of_tiers():
    names = [tier.name for tier in parse_tiers("Q4_K_M, optimal@Q4_K_M,stock-q4_k_m,cd-q4_k_m", "3.50,4")]
    assert names == ["optimal-3.5", "optimal-4", "stock-q4_k_m", "optimal@q4_k_m", "cd-q4_k_m"]
    with pytest.raises(InputError, match="unknown"):
        parse_tiers("optimal@optimal", None)
