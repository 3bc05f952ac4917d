"""Running `gguf-mixed plan` and `quantize` in a folder that holds `model.gguf`; used by several test files."""

from gemma4q_kernels.ggml import GGMLQuantizationType
from llama_quantize import imatrix_of, small_model
from test_gguf_cli import gguf_mixed

from gguf_mixed.imatrix_gguf import write_imatrix
from gguf_mixed.imatrix_legacy import write_legacy
from gguf_mixed.llama_cpp import find_tool
from gguf_mixed.overrides import override_table
from gguf_mixed.quantize import Job
from gguf_mixed.tensors import read_inventory

T = GGMLQuantizationType
NEW_HELP = "usage: [--tensor-type] [--tensor-type-file]"
OLD_HELP = "usage: [--tensor-type]"


def with_imatrices(folder):
    """Write the small model and its imatrix, in both formats."""
    inventory = read_inventory(small_model(folder))
    write_imatrix(imatrix_of(inventory), folder / "imatrix.gguf")
    write_legacy(imatrix_of(inventory), folder / "imatrix.dat")
    return folder


def ok(*arguments, **options):
    finished = gguf_mixed(*arguments, **options)
    assert finished.returncode == 0, finished.stderr
    return finished


def plan(folder, recipe, *arguments):
    return ok("plan", folder / "model.gguf", "--recipe", recipe, "-o", folder / "table.txt", *arguments)


def llama(folder, script):
    """A llama-quantize of its own kind in a folder for --llama-cpp."""
    tool = folder / "tools" / "llama-quantize"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return tool


def quantize(folder, *arguments, **options):
    """`quantize` finds the built llama-quantize by `--llama-cpp` unless told otherwise."""
    command = ["quantize", folder / "model.gguf", folder / "out.gguf", "--overrides", folder / "table.txt"]
    if "--llama-cpp" not in arguments:
        command += ["--llama-cpp", find_tool("llama-quantize").parent]
    return gguf_mixed(*command, *arguments, **options)


def job_of(folder):
    inventory = read_inventory(folder / "model.gguf")
    asked = dict.fromkeys(imatrix_of(inventory).entries, T.Q8_0)
    return Job(inventory, override_table(inventory, asked))
