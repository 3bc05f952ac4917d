"""`gguf-mixed prune` as a user runs it, and what it hands on to `plan`, `quantize` and `verify`."""

import json
import sys

import in_process
import pytest
from ggml_runs import uneven
from gguf_files import gemma4_metadata, moe_26b_a4b, write_gguf
from peak_memory import measure
from prune_models import drop_map, metadata, model
from quantize_runs import T, ok

from gguf_mixed.header import read_header
from gguf_mixed.imatrix_gguf import read_imatrix, write_imatrix
from gguf_mixed.imatrix_legacy import write_legacy
from gguf_mixed.tensors import read_inventory


@pytest.fixture
def folder(tmp_path):
    source = model(tmp_path)
    drop_map(tmp_path)
    write_imatrix(uneven(read_inventory(source)), tmp_path / "i.gguf")
    return tmp_path


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    def main(*arguments, code=0):
        finished = in_process.run("gguf-mixed", *arguments)
        assert finished.returncode == code, finished.stderr
        return finished

    return main


def arguments(folder, *more):
    return ["prune", folder / "model.gguf", folder / "out.gguf", "--drop-map", folder / "drop.json", *more]


def with_imatrix(folder, source="i.gguf"):
    return ["--imatrix", folder / source, "--imatrix-output", folder / "o.gguf"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_model_and_its_imatrix(folder):
    (folder / "out.gguf.partial").write_text("what a killed run left")
    finished = ok(*arguments(folder, "--top-k", 2, *with_imatrix(folder)))
    lines = [" ".join(line.split()) for line in finished.stdout.splitlines()]
    before, after = (folder / name for name in ("model.gguf", "out.gguf"))
    assert "ffn_gate_up_exps.weight 2 256x8x6 49.2 kB 32.8 kB" in lines
    assert "ffn_down_exps.scale 2 6 48 bytes 32 bytes" in lines
    assert lines[-4] == "2 layers keep 4 of 6 experts, top 2, before 3"
    assert lines[-3] == "parameters: 53,521 -> 37,133, tensors: 114.2 kB -> 79.4 kB"
    assert lines[-2] == f"{after}: {before.stat().st_size:,} -> {after.stat().st_size:,} bytes"
    assert lines[-1] == f"{folder / 'o.gguf'}: 4 of 6 entries sliced"
    assert finished.stderr == ""
    assert names(folder) == ["drop.json", "i.gguf", "model.gguf", "o.gguf", "out.gguf"]
    assert read_inventory(after).metadata["gemma4.expert_used_count"].value == 2
    assert read_imatrix(folder / "o.gguf").matches(read_inventory(after)) == ("token_embd.weight",)


def test_one_json_document(run, folder):
    finished = run(*arguments(folder, "--json", *with_imatrix(folder)))
    report = json.loads(finished.stdout)
    sizes = {"before": (folder / "model.gguf").stat().st_size, "after": (folder / "out.gguf").stat().st_size}
    assert (report["file_bytes"], report["layers"], report["dry_run"]) == (sizes, 2, False)
    assert (report["experts"], report["top_k"]) == ({"before": 6, "after": 4}, {"before": 3, "after": 3})
    after = read_inventory(folder / "out.gguf")
    assert (report["parameters"]["after"], report["tensor_bytes"]["after"]) == (after.n_elements, after.tensor_bytes)
    roles = {item["role"]: item["bytes"] for item in report["sliced"]}
    assert set(roles) == {f"ffn_{part}" for part in ("gate_up_exps.weight", "down_exps.weight", "down_exps.scale")} | {
        "ffn_gate_inp.weight"
    }
    saved = sum(change["before"] - change["after"] for change in roles.values())
    assert saved == report["tensor_bytes"]["before"] - report["tensor_bytes"]["after"]
    assert report["imatrix"] == {"output": str(folder / "o.gguf"), "entries": 6, "sliced": 4}


def test_a_dry_run_says_the_same_and_writes_nothing(run, folder):
    before = names(folder)
    told = run(*arguments(folder, "--dry-run", *with_imatrix(folder))).stdout
    dry = json.loads(run(*arguments(folder, "--dry-run", "--json", *with_imatrix(folder))).stdout)
    assert names(folder) == before
    assert told.splitlines()[-2].startswith(f"{folder / 'out.gguf'} (not written): ")
    done = json.loads(run(*arguments(folder, "--json", *with_imatrix(folder))).stdout)
    assert {**dry, "dry_run": False} == done


def test_a_legacy_imatrix_becomes_a_gguf(run, folder):
    write_legacy(read_imatrix(folder / "i.gguf"), folder / "i.dat")
    run(*arguments(folder, *with_imatrix(folder, "i.dat")))
    whole, sliced = read_imatrix(folder / "i.dat"), read_imatrix(folder / "o.gguf")
    name = "blk.1.ffn_down_exps.weight"
    weights = whole.entries[name].weights.reshape(6, 256)
    assert sliced.entries[name].weights.reshape(4, 256).tolist() == weights[:4].tolist()


def test_outputs_are_not_replaced_unasked(run, folder):
    run(*arguments(folder, *with_imatrix(folder)))
    content = {name: (folder / name).read_bytes() for name in names(folder)}
    for given, name in (([], "out.gguf"), (with_imatrix(folder), "o.gguf")):
        finished = run(*arguments(folder, *given), code=2)
        assert (finished.returncode, finished.stderr) == (2, f"error: {name}: exists: --overwrite\n")
    run(*arguments(folder, "--overwrite", *with_imatrix(folder)))
    assert content == {name: (folder / name).read_bytes() for name in names(folder)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--drop-map", "uneven.json"], "the drop map keeps 5 to 6 experts a layer, expected one number for all"),
        (["--drop-map", "none.json"], "none.json: cannot be read"),
        (["--imatrix", "i.gguf"], "--imatrix FILE and --imatrix-output FILE go together"),
        (["--imatrix-output", "o.gguf"], "--imatrix FILE and --imatrix-output FILE go together"),
        (["--imatrix", "i.gguf", "--imatrix-output", "out.gguf"], "out.gguf: --imatrix-output is one of the other"),
        (["--imatrix", "i.gguf", "--imatrix-output", "i.gguf"], "i.gguf: --imatrix-output is one of the other files"),
        (["--imatrix", "i.gguf", "--imatrix-output", "no/o.gguf"], "no/o.gguf: cannot be written: No such file"),
        (["--imatrix", "model.gguf", "--imatrix-output", "o.gguf"], "model.gguf: not an imatrix"),
        (["--top-k", "5"], "layer 0: 4 of 6 experts left, expected at least 5 (top_k)"),
    ],
)
def test_errors_are_one_line(run, folder, changed, message):
    (folder / "uneven.json").write_text('{"0": [1], "1": []}')
    before = names(folder)
    changed = [folder / item if item.endswith((".gguf", ".json")) else item for item in changed]
    finished = run(*arguments(folder, "--json", *changed), code=2)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1
    assert message in finished.stderr and names(folder) == before


def test_the_model_itself_is_no_output(run, folder):
    finished = run("prune", folder / "model.gguf", folder / "model.gguf", *arguments(folder)[3:], "--overwrite", code=2)
    assert (finished.returncode, finished.stderr) == (2, "error: model.gguf: is the model itself\n")


def test_a_header_alone_is_enough_to_plan_with(run, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", moe_26b_a4b(), gemma4_metadata(30, 2816, 2112, 128))
    with path.open("r+b") as file:
        file.truncate(read_header(path).data_start)
    drop_map(tmp_path, {layer: [*range(layer, layer + 30)] for layer in range(30)}, 30)
    finished = run(*arguments(tmp_path))
    assert finished.stderr == "note: model.gguf is only a header, and so is what comes of it\n"
    # 30 experts of 30 layers: 2 x 704 and 704 rows, a router's row, a scale
    assert 25_233_142_046 - 19_877_953_946 == 30 * 30 * (2816 * 2112 + 2816 + 1)
    assert "parameters: 25,233,142,046 -> 19,877,953,946, tensors: 50.5 GB -> 39.8 GB\n" in finished.stdout
    planned = run("plan", tmp_path / "out.gguf", "--recipe", "uniform-q4_k", "-o", tmp_path / "t.txt", "--json")
    inventory = read_inventory(tmp_path / "out.gguf")
    types = json.loads(planned.stdout)["types"]
    assert types["blk.0.ffn_down_exps.weight"] == "q5_0" and set(types) == set(inventory.tensors)


def test_the_pruned_model_is_planned_quantized_and_verified(run, folder):
    """With the library of a wheel; llama-quantize takes the same in the slow tests."""
    run(*arguments(folder, *with_imatrix(folder)))
    data, table = ["--imatrix", folder / "o.gguf"], folder / "table.txt"
    run("plan", folder / "out.gguf", "--recipe", "cd-q4_k_m", "-o", table, *data)
    given = [
        "quantize",
        folder / "out.gguf",
        folder / "q.gguf",
        "--overrides",
        table,
        "--engine",
        "ggml",
        *data,
        "--json",
    ]
    dry, done = (json.loads(run(*given, *more).stdout) for more in (["--dry-run"], []))
    size = (folder / "q.gguf").stat().st_size
    assert (done["bytes"], done["tensors"], done["differences"], done["dry_run"]) == (size, 14, [], False)
    assert dry == {key: value for key, value in done.items() if key != "differences"} | {"dry_run": True}
    assert "all 14 tensors and the size are as planned" in run("verify", folder / "q.gguf", table).stdout
    report = {"model": str(folder / "q.gguf"), "tensors": 14, "differences": []}
    assert json.loads(run("verify", folder / "q.gguf", table, "--json").stdout) == report
    other = json.loads(run("verify", folder / "out.gguf", table, "--json", code=1).stdout)
    assert other["tensors"] == 14 and other["differences"]
    finished = run("plan", folder / "out.gguf", "--recipe", "rank15", "-o", table, *with_imatrix(folder)[:2], code=2)
    assert "imatrix is of another model: tensor blk." in finished.stderr


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Experts of 2 GiB take hardly more than a dry run."""
    tensors = [
        ("blk.0.ffn_down_exps.weight", (4096, 16384, 8), T.F32),
        ("blk.0.ffn_gate_inp.weight", (4096, 8), T.F32),
    ]
    keys = metadata(8) | {"gemma4.block_count": 1}
    write_gguf(tmp_path / "model.gguf", tensors, keys)
    drop_map(tmp_path, {0: [0, 2, 5, 6]}, 1)
    command = [sys.executable, "-m", "gguf_mixed.cli", *arguments(tmp_path)]
    dry, real = measure([*command, "--dry-run"]), measure(command)
    assert (tmp_path / "out.gguf").stat().st_size > 2**30
    print(f"{real.seconds:.1f} s, {(real.peak_bytes - dry.peak_bytes) / 2**20:.1f} MiB more than a dry run")
    assert real.peak_bytes - dry.peak_bytes < 20 * 2**20
