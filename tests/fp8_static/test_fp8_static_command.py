"""`gemma4q quantize --scheme fp8-static` as users run it: options, JSON, refusals in one line. tests/crash kills it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from made_statistics import write_for
from synthetic import small_config, write_checkpoint

from vllm_gemma4q.fp8_static.inputs import UNREACHED

GEMMA4Q = Path(sys.executable).with_name("gemma4q")
OPTIONS = ["--scheme", "fp8-static", "--statistics"]


def gemma4q(*arguments, code=0):
    result = subprocess.run([GEMMA4Q, "quantize", *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    write_checkpoint(folder / "source", small_config(moe=True), shards=2)
    write_for(folder / "source", folder / "statistics", unreached=(3,))
    return folder


def test_what_is_printed(made, tmp_path):
    arguments = [made / "source", tmp_path / "target", *OPTIONS, made / "statistics"]
    planned = gemma4q(*arguments, "--dry-run").stdout
    assert "Nothing was written (--dry-run)." in planned
    assert not (tmp_path / "target").exists()
    done = gemma4q(*arguments).stdout
    assert "Weights: 0 clipped, " in done
    reported = next(line for line in done.splitlines() if line.startswith("Input scale of 9 linear(s), such as "))
    assert ".experts.3." in reported
    assert reported.endswith(UNREACHED)
    assert "vllm serve" in done


def test_json(made, tmp_path):
    arguments = [made / "source", tmp_path / "target", *OPTIONS, made / "statistics", "--json", "--dry-run"]
    report = json.loads(gemma4q(*arguments, "--weight-scale", "mse", "--activation-scale", "percentile").stdout)
    assert (report["scheme"], report["written"]) == ("fp8-static", False)
    assert report["rules"] == {"activations": "percentile", "weights": "mse", "granularity": "per-tensor"}
    assert report["roles"]["experts"]["quantized"] == report["roles"]["experts"]["parameters"] > 0
    assert report["roles"]["router"]["quantized"] == 0
    assert len(report["fallbacks"][UNREACHED]) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "fp8-static"], "--statistics is missing, expected what gemma4q calibrate wrote"),
        ([*OPTIONS, "absent"], "absent: cannot be read as a statistics file"),
        (["--scheme", "quark-int8", "--weight-scale", "mse"], "--weight-scale: got mse, expected nothing"),
        (["--scheme", "quark-int8", "--statistics", "s"], "--statistics: got s, expected nothing"),
    ],
    ids=["no statistics", "absent statistics", "rule of another scheme", "statistics of another scheme"],
)
def test_refusals_are_one_line(made, tmp_path, options, message):
    error = gemma4q(made / "source", tmp_path / "target", *options, code=2).stderr
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "target").exists()
