"""A small model for the writer that needs ggml's library alone, and a stand-in for that library."""

import numpy as np
from gemma4q_kernels.ggml.quantize import Quantizers, find_library
from gguf import quants
from gguf_files import gemma4_metadata, write_gguf
from llama_quantize import imatrix_of
from quantize_runs import T

from gguf_mixed.ggml_writer import write_model
from gguf_mixed.imatrix import Imatrix, ImatrixEntry
from gguf_mixed.imatrix_gguf import read_imatrix
from gguf_mixed.overrides import override_table
from gguf_mixed.quantize import Job, write_and_verify
from gguf_mixed.tensors import read_inventory

# Rows that every type can store, sources of every float type, kept tensors of each, and one of 1-D.
TENSORS = [
    ("blk.10.ffn_up.weight", (512, 40), T.F16),
    ("blk.2.ffn_down_exps.weight", (256, 24, 3), T.BF16),
    ("blk.2.ffn_gate_inp.weight", (256, 3), T.F16),
    ("blk.2.attn_norm.weight", (256,), T.F32),
    ("blk.2.attn_scale.weight", (64,), T.F16),
    ("token_embd.weight", (256, 96), T.F32),
    ("blk.2.attn_q.weight", (256, 3000), T.F32),
    ("output_norm.weight", (256,), T.BF16),
]


class PackageQuantizers:
    """The gguf package's quantizers behind the library's interface: the same bits for the few types it can write."""

    types = (T.Q4_0, T.Q8_0, T.F16, T.BF16, T.F32)

    def quantize(self, rows, qtype, weights=None):
        return quants.quantize(rows, qtype).view(np.uint8)

    def dequantize(self, packed, qtype):
        stored = packed.view(np.float16) if qtype is T.F16 else packed
        return quants.dequantize(stored, qtype).astype(np.float32)


def model(folder, tensors=TENSORS):
    return write_gguf(folder / "model.gguf", tensors, gemma4_metadata(11, 256, 512, 3), random_weights=True)


def uneven(inventory):
    """Data for every quantizable tensor but the embeddings, one expert never visited."""
    generator = np.random.default_rng(3)
    entries = {}
    for name, entry in imatrix_of(inventory).entries.items():
        if name != "token_embd.weight":
            sums = np.exp(2 * generator.standard_normal(entry.sums.shape)).astype(np.float32)
            entries[name] = ImatrixEntry(sums, entry.counts)
    return Imatrix(entries, ("calibration.txt",), 7, 512)


def job_for(path, types, imatrix_path=None):
    inventory = read_inventory(path)
    names = [name for name, tensor in inventory.tensors.items() if not tensor.kept_because]
    asked = dict(zip(names, types, strict=True)) if isinstance(types, list) else dict.fromkeys(names, types)
    imatrix = None if imatrix_path is None else read_imatrix(imatrix_path)
    return Job(inventory, override_table(inventory, asked), imatrix, imatrix_path)


def load(folder):
    return Quantizers(find_library([folder], wheels=False))


def write(job, quantizers, output, threads=1):
    """The differences from the plan."""
    return write_and_verify(job, output, lambda path: write_model(job, quantizers, path, threads))
