"""`make demo`'s script, run whole: what it reports is what it wrote."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_demo(tmp_path, model):
    command = [sys.executable, ROOT / "examples" / "demo.py", "--model", ROOT / "examples" / "small_gemma4" / model]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "demo-output" / "report.json").read_text())
    target = tmp_path / report["checkpoint"]
    assert report["output_bytes"] == (target / "model.safetensors").stat().st_size
    assert report["roles"]["mlp"]["quantized"] == report["roles"]["mlp"]["parameters"]
    assert 0 < report["divergence"]["mean_kld"] < 0.05
    assert report["divergence"]["same_top"] > 0.9
    assert report["answers"]["int8"]
    for said in (report["checkpoint"], "same top token", repr(report["answers"]["int8"])):
        assert said in result.stdout


def test_bad_model_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "examples" / "demo.py", "--model", tmp_path / "absent"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.strip().endswith("absent: not a folder")
