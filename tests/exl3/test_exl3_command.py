"""`gemma4q quantize --scheme exl3` as users run it: options, JSON, refusals in one line. tests/crash kills it."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exl3_runs import FULL, LAYER, SLIDING, load, run, tiny_config, write_hessians
from made_statistics import write_for
from safetensors.torch import save_file
from synthetic import write_checkpoint

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.exl3 import memory, steps
from vllm_gemma4q.exl3.quantize import Options, plan

GEMMA4Q = Path(sys.executable).with_name("gemma4q")
EXL3 = ["--scheme", "exl3", "--bits", "3.5"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    write_checkpoint(folder / "source", tiny_config(SLIDING, FULL))
    write_hessians(folder / "source", folder / "hessians")
    write_for(folder / "source", folder / "without")
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "exl3", "--no-hessian"], "--bits is missing, expected 1 to 8, such as 3.5"),
        (EXL3, "--statistics is missing, expected what gemma4q calibrate --hessians wrote"),
        ([*EXL3, "--no-hessian", "--statistics", "hessians"], "--no-hessian: got --statistics hessians too"),
        ([*EXL3, "--statistics", "absent"], "absent: cannot be read as a statistics file"),
        ([*EXL3, "--statistics", "without"], "down_proj: missing, expected what gemma4q calibrate --hessians wrote"),
        (["--scheme", "exl3", "--bits", "8.1", "--no-hessian"], "bits: got 8.1, expected 1 to 8"),
        ([*EXL3, "--no-hessian", "--head-bits", "9"], "head bits: got 9, expected 1 to 8, or 16 to leave it"),
        ([*EXL3, "--no-hessian", "--weight-scale", "mse"], "--weight-scale: got mse, expected nothing"),
        (["--scheme", "quark-int8", "--bits", "4"], "--bits: got 4.0, expected nothing: --scheme quark-int8 does not"),
        (["--scheme", "quark-int8", "--no-hessian"], "--no-hessian: got it, expected nothing"),
        (["--scheme", "fp8-static", "--codebook", "mcg"], "--codebook: got mcg, expected nothing"),
    ],
)
def test_refusals_are_one_line(made, tmp_path, monkeypatch, gemma4q, options, message):
    monkeypatch.chdir(made)
    code, _, error = gemma4q("quantize", "source", tmp_path / "target", *options)
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "target").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(made, tmp_path, monkeypatch, gemma4q):
    options = [*EXL3, "--no-hessian", "--device", "cuda"]
    code, _, error = gemma4q("quantize", made / "source", tmp_path / "target", *options)
    assert (code, error) == (2, "error: device cuda: torch sees no GPU\n")


def test_no_numba(made, tmp_path, monkeypatch, gemma4q):
    """The definition would take a hundred times as long: better say what is missing."""
    monkeypatch.setitem(sys.modules, "numba", None)
    code, _, error = gemma4q("quantize", made / "source", tmp_path / "target", *EXL3, "--no-hessian")
    assert (code, error.count("\n")) == (2, 1)
    assert "device cpu: numba cannot encode: numba is not installed (pip install 'vllm-gemma4q[exl3]')" in error


def test_dry_run_as_json(made, tmp_path, monkeypatch, gemma4q):
    options = [*EXL3, "--statistics", made / "hessians", "--head-bits", "4", "--dry-run", "--json"]
    code, out, _ = gemma4q("quantize", made / "source", tmp_path / "target", *options)
    report = json.loads(out)
    assert (code, report["scheme"], report["written"]) == (0, "exl3", False)
    assert report["quantization"]["head_bits"] == 4
    assert set(report["bits"]) == {"attention", "mlp", "lm_head", "layers"}
    assert report["bits"]["layers"]["bytes"] == sum(report["bits"][role]["bytes"] for role in ("attention", "mlp"))
    assert report["roles"]["lm_head"]["bytes_after"] == report["bits"]["lm_head"]["bytes"]
    headers = report["source_bytes"] - report["roles"]["total"]["bytes_before"]
    assert 0 < headers < 10_000, "the embedding counts once, though the head is made of it too"
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("without", "change", "message"),
    [
        ({f"{LAYER}.mlp.down_proj"}, lambda name, h: h, "Hessian of .*0.mlp.down_proj: missing"),
        ({"lm_head"}, lambda name, h: h, "Hessian of lm_head: missing"),
        ((), lambda name, h: h[1:, 1:], r"Hessian of .*down_proj: got \[95, 95\], expected \[96, 96\]"),
    ],
    ids=["no down_proj", "no lm_head", "size"],
)
def test_statistics_that_lack_a_hessian(made, tmp_path, without, change, message):
    write_hessians(made / "source", tmp_path / "statistics", without, change)
    with pytest.raises(InputError, match=message):
        plan(open_checkpoint(made / "source"), Options(4), tmp_path / "statistics")


def test_statistics_that_are_gone_for_a_moment(made, tmp_path):
    """As with a network's file system: what is finished stays, and the same command goes on."""
    shutil.copy(made / "hessians", tmp_path / "hessians")
    planned = plan(open_checkpoint(made / "source"), Options(1), tmp_path / "hessians", 100_000)
    whole = tmp_path / "whole"
    assert convert(planned, whole, ["test"], lambda _: None)

    def lose(n_bytes):
        if (tmp_path / "hessians").exists() and list((tmp_path / "target").glob("*.safetensors")):
            (tmp_path / "hessians").rename(tmp_path / "elsewhere")

    with pytest.raises(InputError, match="hessians: cannot be read: No such file or directory"):
        convert(planned, tmp_path / "target", ["test"], lose)
    (tmp_path / "elsewhere").rename(tmp_path / "hessians")
    left = {path.name for path in (tmp_path / "target").glob("*.safetensors")}
    assert left and left < {path.name for path in whole.iterdir()}
    assert convert(planned, tmp_path / "target", ["test"], lambda _: None)
    for path in whole.iterdir():
        assert (tmp_path / "target" / path.name).read_bytes() == path.read_bytes()


def test_a_head_that_stays_needs_no_hessian(made, tmp_path):
    write_hessians(made / "source", tmp_path / "statistics", {"lm_head"})
    planned = plan(open_checkpoint(made / "source"), Options(4, 16), tmp_path / "statistics")
    assert not [output for step in planned.steps for output in step.written if output.name.startswith("lm_head")]


def test_statistics_of_another_model(made, tmp_path):
    write_checkpoint(tmp_path / "other", tiny_config(SLIDING))
    write_hessians(tmp_path / "other", tmp_path / "statistics")
    with pytest.raises(InputError, match="statistics of another model: nothing for .*layers.1"):
        plan(open_checkpoint(made / "source"), Options(4), tmp_path / "statistics")


def test_statistics_of_another_fine_tune(made, tmp_path):
    """The same names and shapes: its Hessians would be taken without a word."""
    tuned = open_checkpoint(write_checkpoint(tmp_path / "tuned", tiny_config(SLIDING, FULL), seed=1))
    with pytest.raises(InputError, match=r"hessians: statistics of another model: source \(\w+\), expected tuned \("):
        plan(tuned, Options(4), made / "hessians")


def test_memory_is_looked_for_before_anything_is_written(made, tmp_path, monkeypatch, gemma4q):
    """The head takes most, and comes last."""
    command = ["quantize", made / "source", tmp_path / "target", *EXL3, "--no-hessian"]
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    code, _, error = gemma4q(*command)
    assert code == 2 and not (tmp_path / "target").exists()
    expected = r"error: lm_head: takes about \d+\.\d GB of memory to quantize, and device cpu has 0\.0 free, expected "
    assert re.match(expected + "--head-bits 16, which leaves it as it is, or a device with more\n", error), error
    assert gemma4q(*command, "--dry-run")[0] == 0


def test_memory_that_is_free():
    assert memory.free_bytes("cpu") is None or 1e8 < memory.free_bytes("cpu") < 1e13


def test_a_full_gpu_keeps_what_is_finished(made, tmp_path, monkeypatch):
    calls = []
    compute = steps.Writing._compute

    def full(self, linear, rows, progress):
        calls.append(linear.module)
        if len(calls) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, linear, rows, progress)

    monkeypatch.setattr(steps.Writing, "_compute", full)
    planned = plan(open_checkpoint(made / "source"), Options(1), None, 100_000)
    with pytest.raises(InputError, match="tensor .*: the device's memory is full; run it again with more"):
        convert(planned, tmp_path / "target", ["test"], lambda _: None)
    assert list((tmp_path / "target").glob("*.safetensors"))
    assert convert(planned, tmp_path / "target", ["test"], lambda _: None)


def test_already_quantized(made, tmp_path):
    config = {**tiny_config(FULL), "quantization_config": {"quant_method": "exl3"}}
    write_checkpoint(tmp_path / "source", config)
    with pytest.raises(InputError, match="already quantized"):
        plan(open_checkpoint(tmp_path / "source"), Options(4), None)


@pytest.mark.parametrize("bad", ["weight", "hessian"])
def test_numbers_that_are_not_finite(made, tmp_path, bad):
    """Found on the way: named, and what was written is removed."""
    source = write_checkpoint(tmp_path / "source", tiny_config(FULL))
    module = f"{LAYER}.mlp.down_proj"
    if bad == "weight":
        tensors = load(source)
        tensors[f"{module}.weight"][3, 4] = torch.nan
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    def change(name, hessian):
        return np.full_like(hessian, np.nan) if bad == "hessian" and name == module else hessian

    write_hessians(source, tmp_path / "statistics", change=change)
    with pytest.raises(InputError, match=rf"tensor {module}\.weight, from row 0: {bad}: got NaN"):
        run(source, tmp_path / "target", Options(4, 16), tmp_path / "statistics")
    assert not (tmp_path / "target").exists()


def test_other_statistics_do_not_resume(made, tmp_path):
    """What decides the bytes is part of the run's identity: bits, device and the statistics file."""
    source = open_checkpoint(made / "source")
    write_hessians(made / "source", tmp_path / "hessians", change=lambda name, hessian: 2 * hessian)
    identities = [
        plan(source, options, statistics).identity()
        for options in (Options(4), Options(4, 5), Options(4, codebook="mul1"))
        for statistics in (None, made / "hessians", tmp_path / "hessians")
    ]
    assert all(one != other for index, one in enumerate(identities) for other in identities[:index])
    assert plan(source, Options(4), None).identity() == identities[0]
