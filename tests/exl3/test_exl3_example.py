"""examples/quantize_exl3_and_serve.sh: the figures in its header, and the whole of it up to `vllm serve`.

A `vllm` that writes down its arguments stands first on PATH; `gemma4q` is the real one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from exl3_runs import FULL, manifest, tiny_config
from synthetic import CONFIG_31B, shapes, write_checkpoint, write_header_only

from vllm_gemma4q.calibration.statistics import read_statistics
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.exl3.allocation import padded_weights
from vllm_gemma4q.exl3.quantize import Options, plan
from vllm_gemma4q.linears import linears_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "quantize_exl3_and_serve.sh"
SMALL = ROOT / "examples" / "small_gemma4" / "dense"
RECORDER = '#!/bin/sh\nprintf "%s\\0" "$@" > "$RECORD"\n'
VARIABLES = ("BITS", "HEAD_BITS", "SAMPLES", "LENGTH", "DEVICE")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def run_script(folder, *arguments, **variables):
    recorder = folder / "vllm"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    path = ":".join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**kept, **variables, "PATH": path, "RECORD": str(folder / "record")}
    finished = subprocess.run([SCRIPT, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    record = folder / "record"
    return finished, record.read_text().split("\0")[:-1] if record.exists() else []


def test_figures_in_the_header(tmp_path):
    source = open_checkpoint(write_header_only(tmp_path / "source", CONFIG_31B, shapes(CONFIG_31B).items()))
    linears = [linear for tensor in source.tensors.values() for linear in linears_of(tensor)]
    inputs = [linear for linear in linears if not linear.module.endswith(("k_proj", "v_proj", "up_proj"))]
    hidden = CONFIG_31B["text_config"]["hidden_size"]
    hessians = 4 * (sum(linear.shape[1] ** 2 for linear in inputs) + hidden**2)
    head = CONFIG_31B["text_config"]["vocab_size"] * hidden
    tiles = (sum(map(padded_weights, linears)) + head) / 256
    text = SCRIPT.read_text()
    assert f"Hessians {hessians / 1e9:.2f} GB" in text
    assert f"the checkpoint {plan(source, Options(3.5), None).output_bytes / 1e9:.2f} GB" in text
    assert f"takes {2 * head / 1e9:.2f}." in text
    assert f"{head / 1e9:.1f}\n# billion weights" in text
    assert f"{tiles / 1e6:.1f} million tiles" in text
    assert f"that is {tiles * 0.002 / 3600:.0f} core hours" in text


def test_a_missing_text_is_a_usage_error(tmp_path):
    finished, called = run_script(tmp_path, "a checkpoint")
    assert (finished.returncode, finished.stdout, called) == (2, "", [])
    assert finished.stderr.startswith("usage: ")


@pytest.mark.engine
@pytest.mark.slow
def test_runs_and_runs_again(tmp_path):
    """One layer of random weights, with the small checkpoint's tokenizer; calibrated, quantized, handed to vLLM."""
    config = json.loads((SMALL / "config.json").read_text())
    sizes = tiny_config(FULL, vocab_size=config["text_config"]["vocab_size"])["text_config"]
    config["text_config"] |= {key: sizes[key] for key in config["text_config"].keys() & sizes.keys()}
    source = write_checkpoint(tmp_path / "my model", config)
    for name in TOKENIZER:
        shutil.copy(SMALL / name, source)
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog.\n" * 50)
    variables = {"SAMPLES": "2", "LENGTH": "64", "BITS": "4", "HEAD_BITS": "4", "OMP_NUM_THREADS": "1"}
    finished, called = run_script(tmp_path, "my model/", "text", "--port", "8001", **variables)
    assert finished.returncode == 0, finished.stderr
    assert called == ["serve", "my model-4bpw-exl3", "--port", "8001"]
    details = manifest(tmp_path / called[1])["details"]
    assert (details["quantization"]["bits"], details["quantization"]["head_bits"]) == (4.0, 4)
    assert details["statistics"]["samples"] == 2
    assert read_statistics(tmp_path / "my model-hessians.safetensors").hessian("lm_head") is not None
    again, _ = run_script(tmp_path, "my model", "text", **variables)
    assert again.returncode == 0, again.stderr
    assert "already complete: nothing to do" in again.stdout
