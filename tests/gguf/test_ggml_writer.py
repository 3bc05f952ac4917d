"""Files written with ggml's library alone: the bytes of a real llama-quantize, in bounded memory."""

import re
import sys

import numpy as np
import pytest
from gemma4q_kernels.ggml import QUANTIZABLE_TYPES
from gemma4q_kernels.ggml.quantize import find_library
from ggml_runs import TENSORS, PackageQuantizers, job_for, load, model, uneven, write
from gguf import GGUFReader, quants
from gguf_files import gemma4_metadata, small_moe, write_gguf, write_split
from llama_quantize import small_model
from peak_memory import measure
from quantize_runs import T, ok, plan, with_imatrices

from gguf_mixed.ggml_writer import write_model
from gguf_mixed.imatrix_gguf import write_imatrix
from gguf_mixed.imatrix_legacy import write_legacy
from gguf_mixed.quantize import build_command, partial_path, run_and_verify
from gguf_mixed.tensors import read_inventory


def assert_same(job, tool, quantizers, folder, **options):
    (folder / "table.txt").write_text(job.table.text)
    expected, found = folder / "expected.gguf", folder / "found.gguf"
    command = build_command(tool, job, folder / "table.txt", partial_path(expected), threads=2, **options)
    assert run_and_verify(job, command, expected, lambda _: None) == []
    assert write(job, quantizers, found, 2) == []
    assert found.read_bytes() == expected.read_bytes()


@pytest.fixture(scope="module")
def quantizers(llama_quantize):
    return load(llama_quantize.parent)


@pytest.mark.parametrize("qtype", QUANTIZABLE_TYPES, ids=lambda qtype: qtype.name)
def test_same_bytes_for_every_type(llama_quantize, quantizers, tmp_path, qtype):
    path = model(tmp_path)
    write_imatrix(uneven(read_inventory(path)), tmp_path / "imatrix.gguf")
    needs_data = qtype.name in ("IQ1_S", "IQ2_XXS", "IQ2_XS")  # for the embeddings, which have none
    names = [name for name, shape, _ in TENSORS if len(shape) > 1 and "gate_inp" not in name]
    types = [T.Q4_K if needs_data and name == "token_embd.weight" else qtype for name in names]
    job = job_for(path, types, tmp_path / "imatrix.gguf")
    assert job.written["blk.2.ffn_gate_inp.weight"] is T.F16 and job.written["blk.10.ffn_up.weight"] is qtype
    assert_same(job, llama_quantize, quantizers, tmp_path)


@pytest.mark.parametrize("data", [None, "imatrix.gguf", "imatrix.dat"])
@pytest.mark.parametrize("asked", ["IQ3_S", "Q5_K", "BF16"])
def test_same_bytes_where_rows_fall_back_and_keys_are_odd(llama_quantize, quantizers, tmp_path, asked, data):
    inventory = read_inventory(small_model(tmp_path))
    write_imatrix(uneven(inventory), tmp_path / "imatrix.gguf")
    write_legacy(uneven(inventory), tmp_path / "imatrix.dat")
    job = job_for(tmp_path / "model.gguf", T[asked], data and tmp_path / data)
    assert asked == "BF16" or set(job.written.values()) - {T.F32, T[asked]}
    assert_same(job, llama_quantize, quantizers, tmp_path)


def test_same_bytes_for_a_split_model(llama_quantize, quantizers, tmp_path):
    first, *others = write_split(tmp_path, small_moe(), 7, gemma4_metadata(2, 256, 2112, 3))
    assert others
    generator = np.random.default_rng(4)
    for tensor in read_inventory(first).tensors.values():
        with tensor.path.open("r+b") as file:
            file.seek(tensor.start)
            values = generator.standard_normal(tensor.n_elements, dtype=np.float32)
            file.write(values.tobytes() if tensor.qtype is T.F32 else (values.view(np.uint32) >> 16).astype("<u2"))
    assert_same(job_for(first, T.Q5_1), llama_quantize, quantizers, tmp_path)


def test_same_bytes_for_a_quantized_model(llama_quantize, quantizers, tmp_path):
    first = job_for(model(tmp_path), [T.Q8_0, T.Q6_K, T.Q8_0, T.Q4_K])
    quantized = tmp_path / "quantized.gguf"
    write_model(first, quantizers, quantized)
    again = job_for(quantized, [T.Q8_0, T.Q4_K, T.Q4_0, T.Q4_K])  # sorted by name: copied, and not
    copied = [name for name, tensor in again.inventory.tensors.items() if again.written[name] is tensor.qtype]
    assert 4 < len(copied) < len(TENSORS)
    assert_same(again, llama_quantize, quantizers, tmp_path, allow_requantize=True)


def test_the_command_writes_the_same_with_either_engine(llama_quantize, tmp_path):
    """`auto` takes the library where there is no llama-quantize, and says so."""
    with_imatrices(tmp_path)
    data = ["--imatrix", tmp_path / "imatrix.gguf"]
    plan(tmp_path, "rank15", *data)
    only_library = tmp_path / "library"
    only_library.mkdir()
    (only_library / "libggml-base.so").symlink_to(find_library([llama_quantize.parent]).resolve())

    def quantize(name, folder, *arguments):
        given = ["--overrides", tmp_path / "table.txt", *data, "--llama-cpp", folder, *arguments]
        return ok("quantize", tmp_path / "model.gguf", tmp_path / name, *given)

    quantize("a.gguf", llama_quantize.parent)
    finished = quantize("b.gguf", only_library)
    assert finished.stdout.endswith("all 20 tensors as planned\n") and finished.stderr.count("\n") == 1
    assert finished.stderr.startswith(f"llama-quantize: not in {only_library}")
    assert finished.stderr.endswith(f"using {only_library / 'libggml-base.so'}\n")
    named = quantize("c.gguf", llama_quantize.parent, "--engine", "ggml")
    assert named.stderr == ""
    expected = (tmp_path / "a.gguf").read_bytes()
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes() == expected
    told = quantize("d.gguf", llama_quantize.parent, "--engine", "ggml", "--dry-run", "--threads", 1).stdout
    assert f"{len(expected):,} bytes" in told
    assert "11 tensors quantized and 9 copied by 1 threads" in told and "libggml-base" in told
    assert not (tmp_path / "d.gguf").exists()


def test_memory_does_not_grow_with_the_model(llama_quantize, tmp_path):
    """One tensor of 1 GiB takes hardly more than a dry run, which loads the packages and the library too."""
    path = tmp_path / "model.gguf"
    write_gguf(path, [("blk.0.ffn_up.weight", (4096, 65536), T.F32)], gemma4_metadata(1, 256, 256))
    plan(tmp_path, "uniform-q8_0")
    command = [sys.executable, "-m", "gguf_mixed.cli", "quantize", path, tmp_path / "out.gguf", "--threads", "2"]
    command += ["--overrides", tmp_path / "table.txt", "--engine", "ggml", "--llama-cpp", llama_quantize.parent]
    dry, real = measure([*command, "--dry-run"]), measure(command)
    assert real.peak_bytes - dry.peak_bytes < 50 * 2**20
    assert (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("threads", [1, 3])
def test_every_tensor_is_where_the_header_says(tmp_path, threads):
    job = job_for(model(tmp_path), T.Q8_0)
    output = tmp_path / "out.gguf"
    assert write(job, PackageQuantizers(), output, threads) == []
    written, source = GGUFReader(output), {item.name: item for item in GGUFReader(tmp_path / "model.gguf").tensors}
    blocks = [int(match[1]) if (match := re.match(r"blk\.(\d+)", item.name)) else -1 for item in written.tensors]
    assert blocks == sorted(blocks) == [-1, -1, *[2] * 5, 10]
    for item in written.tensors:
        original = source[item.name]
        if item.tensor_type != original.tensor_type:
            values = quants.dequantize(original.data, original.tensor_type).astype(np.float32)
            assert item.data.tobytes() == quants.quantize(values, item.tensor_type).tobytes(), item.name
        else:
            assert item.data.tobytes() == original.data.tobytes(), item.name
    assert output.stat().st_size % 32 == 0
    assert written.fields["general.quantization_version"].contents() == 2
    assert list(written.fields)[-1] == "general.file_type" and written.fields["general.file_type"].contents() == 7
