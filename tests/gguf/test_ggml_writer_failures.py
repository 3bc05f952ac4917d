"""What the writer that needs ggml's library alone refuses, and that nothing is left when it stops half-way."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ggml_runs import PackageQuantizers, job_for, model, uneven, write
from gguf_files import write_gguf
from quantize_runs import T, llama, plan, with_imatrices
from test_gguf_cli import gguf_mixed

from gguf_mixed.errors import InputError
from gguf_mixed.ggml_writer import write_model
from gguf_mixed.imatrix_gguf import write_imatrix
from gguf_mixed.quantize import write_and_verify
from gguf_mixed.tensors import read_inventory


def spoil(tensor, value):
    with tensor.path.open("r+b") as file:
        file.seek(tensor.start + tensor.n_bytes - 4)
        file.write(np.float32(value).tobytes())


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blk.2.attn_q.weight", np.nan, "rows hold values that are not finite"),
        ("blk.2.attn_q.weight", 1e6, "rows hold values up to 1e.06, Q4_K ends at 65504"),
        ("blk.2.attn_norm.weight", np.inf, "rows hold values that are not finite"),
    ],
)
def test_bad_weights_are_named_and_nothing_is_left(quantizers, tmp_path, name, value, message):
    job = job_for(model(tmp_path), T.Q4_K)
    spoil(job.inventory.tensors[name], value)
    with pytest.raises(InputError, match=f"^tensor {name}: {message}$"):
        write(job, quantizers, tmp_path / "out.gguf", 2)
    assert names_in(tmp_path) == ["model.gguf"]


def test_interrupted_at_work(quantizers, tmp_path):
    """Ctrl-C while threads quantize: exit 130, no traceback, no file."""
    path = model(tmp_path, [("blk.0.ffn_up.weight", (4096, 8192), T.F32), ("token_embd.weight", (256, 8), T.F32)])
    write_imatrix(uneven(read_inventory(path)), tmp_path / "imatrix.gguf")
    data = ["--imatrix", tmp_path / "imatrix.gguf"]
    plan(tmp_path, "uniform-iq3_s", *data)
    command = ["quantize", path, tmp_path / "out.gguf", "--overrides", tmp_path / "table.txt", *data]
    command += ["--engine", "ggml", "--llama-cpp", quantizers.library.parent, "--threads", 2]
    process = subprocess.Popen(
        [sys.executable, "-m", "gguf_mixed.cli", *map(str, command)], stderr=subprocess.PIPE, text=True
    )
    partial = tmp_path / "out.gguf.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size > 100_000):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert not partial.exists() and not (tmp_path / "out.gguf").exists()


def test_refused_before_anything_is_written(tmp_path):
    job = job_for(model(tmp_path), T.Q6_K)
    with pytest.raises(InputError, match="tensor blk.10.ffn_up.weight: this library cannot write Q6_K"):
        write_model(job, PackageQuantizers(), tmp_path / "out.gguf")
    small = job_for(model(tmp_path), T.Q8_0)
    with (tmp_path / "model.gguf").open("r+b") as file:
        file.truncate(small.inventory.headers[0].data_start)
    with pytest.raises(InputError, match="model.gguf: holds no weights, only a header"):
        write_model(job_for(tmp_path / "model.gguf", T.Q8_0), PackageQuantizers(), tmp_path / "out.gguf")
    write_gguf(tmp_path / "model.gguf", [("conv.weight", (32, 2, 2, 2), T.F32)])
    with pytest.raises(InputError, match="tensor conv.weight: 4 dimensions, llama-quantize quantizes at most 3"):
        write_model(job_for(tmp_path / "model.gguf", T.Q8_0), PackageQuantizers(), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_copied_tensor_that_is_not_finite_is_refused(tmp_path):
    job = job_for(model(tmp_path), T.Q8_0)
    spoil(job.inventory.tensors["blk.2.attn_norm.weight"], np.nan)
    with pytest.raises(InputError, match="^tensor blk.2.attn_norm.weight: rows hold values that are not finite$"):
        write(job, PackageQuantizers(), tmp_path / "out.gguf")
    assert names_in(tmp_path) == ["model.gguf"]


def test_a_model_that_shrinks_meanwhile(tmp_path):
    job = job_for(model(tmp_path), T.Q8_0)
    with (tmp_path / "model.gguf").open("r+b") as file:
        file.truncate(job.inventory.file_bytes - 64)
    with pytest.raises(InputError, match="model.gguf: truncated while it was read"):
        write(job, PackageQuantizers(), tmp_path / "out.gguf")
    assert names_in(tmp_path) == ["model.gguf"]


class Interrupting(PackageQuantizers):
    """Ctrl-C after some pieces."""

    left = 3

    def quantize(self, rows, qtype, weights=None):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().quantize(rows, qtype, weights)


def test_an_interruption_leaves_nothing_and_keeps_the_old_file(tmp_path):
    job = job_for(model(tmp_path), T.Q8_0)
    (tmp_path / "out.gguf").write_text("kept")
    with pytest.raises(KeyboardInterrupt):
        write(job, Interrupting(), tmp_path / "out.gguf")
    assert names_in(tmp_path) == ["model.gguf", "out.gguf"]
    assert (tmp_path / "out.gguf").read_text() == "kept"


def test_a_place_that_cannot_be_written(tmp_path):
    job = job_for(model(tmp_path), T.Q8_0)
    with pytest.raises(InputError, match="none/out.gguf: No such file or directory"):
        write_model(job, PackageQuantizers(), tmp_path / "none" / "out.gguf")


def test_what_differs_from_the_plan_is_left_for_inspection(tmp_path):
    job, other = job_for(model(tmp_path), T.Q8_0), job_for(model(tmp_path), T.Q4_0)
    found = write_and_verify(job, tmp_path / "out.gguf", lambda path: write_model(other, PackageQuantizers(), path))
    assert "tensor blk.2.attn_q.weight: got Q4_0, expected Q8_0" in found
    assert (tmp_path / "out.gguf.partial").exists() and not (tmp_path / "out.gguf").exists()


def test_engines_that_are_not_there(tmp_path):
    """One line each, exit 2; an engine that is named is not replaced by the other."""
    with_imatrices(tmp_path)
    plan(tmp_path, "rank15-legacy")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    tool = llama(tmp_path, 'echo "usage: --tensor-type-file"').parent

    def refused(folder, *arguments):
        command = ["quantize", tmp_path / "model.gguf", tmp_path / "out.gguf", "--overrides", tmp_path / "table.txt"]
        finished = gguf_mixed(*command, "--llama-cpp", folder, *arguments, PATH=os.defpath)
        assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
        return finished.stderr

    neither = refused(nothing)
    assert neither.startswith(f"error: llama-quantize: not in {nothing}")
    assert "pip install libggml-python" in neither and f"libggml-base.so: not in {nothing}" in neither
    library = refused(tool, "--engine", "ggml")
    assert library.startswith(f"error: libggml-base.so: not in {tool}")
    assert "--llama-cpp DIR" in library and "pip install libggml-python" in library
    (nothing / "libggml-base.so").touch()
    assert refused(nothing, "--engine", "llama-quantize").startswith(f"error: llama-quantize: not in {nothing}")
    assert "libggml-base.so: cannot be loaded" in refused(nothing)
