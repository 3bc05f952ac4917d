"""`make demo`'s script, run whole: what it reports is what it wrote."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gguf_mixed.tensors import read_inventory

ROOT = Path(__file__).resolve().parents[2]
SMALL_MODELS = ROOT / "examples" / "small_gemma4"


def run_demo(folder, model, *arguments):
    command = [sys.executable, ROOT / "examples" / "demo.py", "--model", model, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.usefixtures("few_vllm_processes")
def test_int8(tmp_path):
    result = run_demo(tmp_path, SMALL_MODELS / "dense", "--part", "int8")
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "demo-output" / "report.json").read_text())
    assert list(content) == ["int8"]
    report = content["int8"]
    target = tmp_path / report["checkpoint"]
    assert report["output_bytes"] == (target / "model.safetensors").stat().st_size
    assert report["roles"]["mlp"]["quantized"] == report["roles"]["mlp"]["parameters"]
    assert 0 < report["divergence"]["mean_kld"] < 0.05
    assert report["divergence"]["same_top"] > 0.9
    assert report["answer"]
    for said in (report["checkpoint"], "same top token", repr(report["answer"])):
        assert said in result.stdout


@pytest.mark.slow
def test_gguf(tmp_path):
    result = run_demo(tmp_path, SMALL_MODELS / "dense", "--part", "gguf")
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "demo-output" / "report.json").read_text())
    assert list(content) == ["gguf"]
    report = content["gguf"]
    kept = tmp_path / report["gguf"]
    types = {tensor.qtype.name for tensor in read_inventory(kept).tensors.values() if not tensor.kept_because}
    assert len(types) > 2
    tiers = {entry["name"]: entry for entry in report["results"]["tiers"]}
    assert kept.stat().st_size == report["file_bytes"] == tiers["optimal@q4_k_m"]["file_bytes"]
    assert {item["mix"] for item in report["comparisons"]} == {"Q4_K_M", "Q3_K_M"}
    for item in report["comparisons"]:
        assert 0.998 * item["stock_bytes"] <= item["our_bytes"] <= item["stock_bytes"]
        assert 0 < item["our_kld"] < item["stock_kld"]
        assert f"{item['stock_bytes']:,} bytes, ours {item['our_bytes']:,}" in result.stdout
    assert (tmp_path / report["plot"]).read_bytes().startswith(b"\x89PNG")
    for step in report["steps"]:
        assert step["command"] in result.stdout
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("base.kld*"))
    texts = [(kept.parent / name).read_text().split("\n\n") for name in ("calibration.txt", "held-out.txt")]
    assert not set(texts[0]) & set(texts[1])


def test_bad_model_is_one_line(tmp_path):
    result = run_demo(tmp_path, tmp_path / "absent")
    assert result.returncode == 2
    assert result.stderr.strip().endswith("absent: not a folder")


@pytest.mark.slow
def test_what_cannot_be_converted_is_one_line(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "none"}')
    result = run_demo(tmp_path, model, "--part", "gguf")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: GGUF: Converting with llama.cpp: ")
    assert "NoSuchModel" in result.stderr
