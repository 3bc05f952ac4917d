"""`gguf-mixed sweep` with a text: every tier written by the real llama-quantize and measured by llama-perplexity.

The models are the small trained ones; what they are measured on was never calibrated on.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from quantize_runs import llama, ok
from small_models import CONTEXT, ROOT
from test_gguf_cli import gguf_mixed

from gguf_mixed.identity import model_sha256
from gguf_mixed.llama_cpp import find_tool
from gguf_mixed.perplexity import positions_of
from gguf_mixed.tensors import read_inventory

CHUNKS = 24
MIXES = ("q4_k_m", "q3_k_m")
TIERS = ",".join(f"{mix},optimal@{mix}" for mix in MIXES)
BPW = "4,6"
KILLED_RUN_SECONDS = 120


@pytest.fixture(scope="module")
def material(llama_quantize, small_gguf, tmp_path_factory):
    """`material("dense" or "moe")`: the model with an importance matrix and a Fisher file of training text."""
    folder = tmp_path_factory.mktemp("material")
    sys.path.insert(0, str(ROOT / "examples"))
    from small_gemma4 import corpus

    (folder / "text.txt").write_text("\n\n".join(corpus.training_sections()), encoding="utf-8")
    text = ["--text", folder / "text.txt", "--threads", 1]

    def make(kind):
        model, imatrix = small_gguf(kind, "bf16"), folder / f"{kind}.imatrix.gguf"
        fisher = folder / f"{kind}.safetensors"
        if not fisher.exists():
            ok("compute-imatrix", model, "-o", imatrix, "--chunks", 100, "--context", CONTEXT, *text)
            checkpoint = ROOT / "examples" / "small_gemma4" / kind
            size = ["--passes", 16, "--length", 256, "--raw"]
            report = json.loads(
                ok("fisher", model, "-o", fisher, "--checkpoint", checkpoint, *size, *text, "--json").stdout
            )
            assert report["output"] == str(fisher) and report["positions"] > report["tensors"] > 0
        return [model, "--imatrix", imatrix, "--sensitivity", fisher, "--cache", folder / f"{kind}.cache"]

    return make


@pytest.fixture
def arguments(material, held_out_text):
    def build(kind, output, *more):
        model, *given = material(kind)
        given += ["--text", held_out_text, "--chunks", CHUNKS, "--context", CONTEXT, "--threads", 1]
        return ["sweep", model, output, *given, "--bpw", BPW, "--tiers", TIERS, *more]

    return build


def untimed(results):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in results["tiers"]]


def read(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_ours_beats_stock_at_equal_size_as_predicted(arguments, tmp_path, kind):
    finished = ok(*arguments(kind, tmp_path / "out", "--json"))
    results = json.loads(finished.stdout)
    assert results == read(tmp_path / "out")
    found = {entry["name"]: entry for entry in results["tiers"]}
    for mix in MIXES:
        stock, ours = found[f"stock-{mix}"], found[f"optimal@{mix}"]
        assert 0.998 * stock["file_bytes"] <= ours["file_bytes"] <= stock["file_bytes"]
        for name in ("mean_kld", "p99_kld"):
            assert 0 < ours["measured"][name] < stock["measured"][name]
        apart = stock["measured"]["mean_kld"] - ours["measured"]["mean_kld"]
        assert apart > 4 * (stock["measured"]["mean_kld_error"] + ours["measured"]["mean_kld_error"])
        assert ours["predicted"] < stock["predicted"]
    by_prediction = sorted(found, key=lambda name: found[name]["predicted"])
    assert by_prediction == sorted(found, key=lambda name: found[name]["measured"]["mean_kld"])
    assert {entry["measured"]["positions"] for entry in found.values()} == {CHUNKS * positions_of(CONTEXT)}
    tables = {f"{name}.txt{end}" for name in found for end in ("", ".json")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == tables | {"results.json", "plot.png"}
    assert "base file" in finished.stderr and "bytes" in finished.stderr


def test_a_killed_sweep_goes_on_where_it_stopped(arguments, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ok(*arguments("dense", whole))
    given = list(map(str, arguments("dense", broken)))
    process = subprocess.Popen(
        [sys.executable, "-m", "gguf_mixed.cli", *given], stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + KILLED_RUN_SECONDS
    while not ((broken / "results.json").exists() and len(read(broken)["tiers"]) >= 2 and any(broken.glob("*.gguf*"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = read(broken)["tiers"]
    assert 2 <= len(before) < len(read(whole)["tiers"])
    assert (broken / "base.kld").exists()
    finished = ok(*given)
    assert "base.kld" in finished.stderr and "reused" in finished.stderr
    after = read(broken)
    assert untimed(after) == untimed(read(whole))
    seconds = {entry["name"]: entry["seconds"] for entry in after["tiers"]}
    assert all(seconds[entry["name"]] == entry["seconds"] for entry in before)  # not done again
    assert {path.name for path in broken.iterdir()} == {path.name for path in whole.iterdir()}
    for table in whole.glob("*.txt*"):
        assert (broken / table.name).read_bytes() == table.read_bytes()
    stamp = (broken / "results.json").stat().st_mtime_ns
    ok(*given)
    assert (broken / "results.json").stat().st_mtime_ns == stamp


def test_predictions_first_then_measured_with_the_library_and_kept(arguments, tmp_path):
    more = ["--bpw", "5", "--tiers", "none"]
    given = arguments("dense", tmp_path / "out", *more)
    text = given.index("--text")
    ok(*given[:text], *given[text + 2 :])
    predicted = read(tmp_path / "out")
    assert (predicted["evaluation"], predicted["tiers"][0]["measured"]) == (None, None)
    ok(*given, "--engine", "ggml", "--keep", "--base", tmp_path / "base.kld")
    (entry,) = read(tmp_path / "out")["tiers"]
    assert entry["measured"]["mean_kld"] > 0
    assert {**entry, "model": None, "measured": None, "seconds": None} == predicted["tiers"][0]
    kept = tmp_path / "out" / "optimal-5.gguf"
    assert kept.stat().st_size == entry["file_bytes"]
    assert entry["model"] == {"name": kept.name, "sha256": model_sha256(read_inventory(kept))}
    ok("verify", kept, tmp_path / "out" / "optimal-5.txt")
    assert (tmp_path / "base.kld").exists() and not (tmp_path / "out" / "base.kld").exists()
    ok(*given[:text], *given[text + 2 :])
    assert read(tmp_path / "out")["tiers"] == [entry]
    other = gguf_mixed(*given, "--chunks", CHUNKS + 1)
    assert (other.returncode, other.stdout, other.stderr.count("\n")) == (2, "", 1)
    assert f"another sweep, made with chunks {CHUNKS}, expected {CHUNKS + 1}" in other.stderr


def test_a_file_that_is_not_as_planned_ends_the_sweep(arguments, tmp_path):
    """A llama-quantize that ignores what it is told writes its usual mix."""
    real = find_tool("llama-quantize")
    script = f"""case "$*" in *--help*|*--dry-run*) exec {real} "$@";; esac
    while [ $# -gt 4 ]; do shift; done; exec {real} "$1" "$2" Q8_0 1"""
    tools = llama(tmp_path, script).parent
    shutil.copy(find_tool("llama-perplexity"), tools)
    for path in real.parent.glob("lib*.so*"):
        (tools / path.name).symlink_to(path)
    finished = gguf_mixed(*arguments("dense", tmp_path / "out", "--bpw", "5", "--tiers", "none", "--llama-cpp", tools))
    assert (finished.returncode, finished.stdout) == (2, "")
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "optimal-5.measuring.gguf.partial: not as planned: tensor " in last
    assert not (tmp_path / "out" / "results.json").exists()


def test_too_short_a_text_is_told_before_any_tier_is_written(arguments, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("The language reference describes. " * 40)
    finished = gguf_mixed(*arguments("dense", tmp_path / "out", "--text", short))
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "short.txt: too small" in finished.stderr.splitlines()[-1]
    assert not list(Path(tmp_path / "out").glob("*.gguf*")) and not (tmp_path / "out" / "base.kld").exists()


def test_a_file_of_the_users_own_stays(arguments, tmp_path):
    """Made of a table that an earlier sweep wrote, say."""
    (tmp_path / "out").mkdir()
    own = tmp_path / "out" / "optimal-5.gguf"
    own.write_bytes(b"mine")
    ok(*arguments("dense", tmp_path / "out", "--bpw", "5", "--tiers", "none"))
    (entry,) = read(tmp_path / "out")["tiers"]
    assert own.read_bytes() == b"mine" and list(own.parent.glob("*.gguf*")) == [own]
    assert entry["model"]["name"] == own.name


def test_stock_mixes_are_planned_once_llama_quantize_is_there(material, tmp_path):
    model, *given = material("dense")
    command = ["sweep", model, tmp_path / "out", *given, "--bpw", "5", "--json"]
    without = json.loads(ok(*command, XDG_CACHE_HOME=str(tmp_path / "cache")).stdout)
    assert "llama-quantize: not on PATH" in without["skipped"]["stock-q4_k_m"]
    found = json.loads(ok(*command, "--llama-cpp", find_tool("llama-quantize").parent).stdout)
    assert "stock-q4_k_m" in {entry["name"] for entry in found["tiers"]}
    assert "stock-q4_k_m" not in found["skipped"]
