"""The file that llama-quantize writes, written with ggml's library alone, byte for byte.

For machines with no llama-quantize: wheels ship the library. `ggml_quantize_chunk` has not changed its signature for
years, whereas the parameters of `llama_model_quantize` are a C struct that changes from one release to the next.

A tensor is cut into pieces of whole rows, none reaching over two of its matrices, since each expert has its own
importances. Threads read, convert and quantize pieces; they are written in order, so memory holds a few pieces for
each thread and never a tensor. As llama-quantize does, tensors that keep their type are copied, split models become one
file, and weights that are not finite are refused, in copied tensors too.
Source: `llama_model_quantize_impl` (src/llama-quant.cpp), b11434. Not done: `--keep-split`.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from gemma4q_kernels.ggml import GGMLQuantizationType, row_bytes, tensor_bytes
from gguf.constants import GGUF_DEFAULT_ALIGNMENT
from tqdm import tqdm

from gguf_mixed.errors import InputError
from gguf_mixed.ggml_header import output_header, written_order
from gguf_mixed.header import pad
from gguf_mixed.quantize import Job
from gguf_mixed.tasks import Threads
from gguf_mixed.tensors import Tensor

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_PIECE_WEIGHTS = 1 << 19
_MOST_DIMENSIONS = 3


class RowQuantizers(Protocol):
    """What is needed of `gemma4q_kernels.ggml.quantize.Quantizers`."""

    @property
    def types(self) -> tuple[GGMLQuantizationType, ...]:
        """Types that it knows."""

    def quantize(self, rows: Floats, qtype: GGMLQuantizationType, weights: Floats | None = None) -> Bytes:
        """float32 [n, row_length] to uint8 [n, bytes of a row]; ValueError where that cannot be."""

    def dequantize(self, packed: Bytes, qtype: GGMLQuantizationType) -> Floats:
        """The inverse."""


def write_model(job: Job, quantizers: RowQuantizers, path: Path, threads: int = 1, progress: bool = False) -> None:
    """Write the job's output to `path`, flushed to the disk.

    Args:
        job: a model and a table.
        quantizers: of ggml's library.
        path: overwritten; left incomplete when this raises.
        threads: pieces quantized at once.
        progress: show a bar on the error stream.

    Raises:
        InputError: see `check_writable`; weights that are not finite or too large for their type; a disk that is full
            or cannot be read.
    """
    check_writable(job, quantizers)
    total = job.inventory.tensor_bytes
    try:
        with path.open("wb") as file, tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
            file.write(output_header(job))
            for piece, packed in _packed_in_order(job, quantizers, threads):
                file.write(packed.data)
                file.write(bytes(piece.padding))
                bar.update(piece.n_bytes)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{error.filename or path.name}: {error.strerror or error}") from error


@dataclass(frozen=True)
class _Piece:
    """Rows of one matrix of a tensor, or of a whole tensor that is copied, and zero bytes to write after them."""

    tensor: Tensor
    target: GGMLQuantizationType
    first_row: int
    n_rows: int
    weights: Floats | None
    padding: int

    @property
    def n_bytes(self) -> int:
        """Bytes that are read."""
        return self.n_rows * row_bytes(self.tensor.qtype, self.tensor.row_length)

    def packed(self, quantizers: RowQuantizers) -> Bytes:
        """uint8 [n_rows, bytes of a row] as it is written."""
        qtype, stored = self.tensor.qtype, self._read()
        try:
            if self.target is not qtype:
                return quantizers.quantize(_values(quantizers, stored, qtype), self.target, self.weights)
            if qtype in quantizers.types and not np.isfinite(_values(quantizers, stored, qtype)).all():
                raise InputError(f"tensor {self.tensor.name}: rows hold values that are not finite")
        except ValueError as error:
            raise InputError(f"tensor {self.tensor.name}: {error}") from error
        return stored

    def _read(self) -> Bytes:
        n_bytes = row_bytes(self.tensor.qtype, self.tensor.row_length)
        start = self.tensor.start + self.first_row * n_bytes
        stored = np.fromfile(self.tensor.path, np.uint8, self.n_bytes, offset=start)
        if stored.size != self.n_bytes:
            raise InputError(f"{self.tensor.path.name}: truncated while it was read: tensor {self.tensor.name}")
        return stored.reshape(self.n_rows, n_bytes)


def _values(quantizers: RowQuantizers, stored: Bytes, qtype: GGMLQuantizationType) -> Floats:
    return stored.view(np.float32) if qtype is GGMLQuantizationType.F32 else quantizers.dequantize(stored, qtype)


def check_writable(job: Job, quantizers: RowQuantizers) -> None:
    """Check that this library can write the job's output at all.

    Raises:
        InputError: no weights in the model, a type that the library does not know, or a tensor of more dimensions than
            llama-quantize quantizes.
    """
    if job.inventory.header_only:
        raise InputError(f"{job.inventory.path.name}: holds no weights, only a header")
    for name, tensor in job.inventory.tensors.items():
        target = job.written[name]
        if target is tensor.qtype:
            continue
        if target not in quantizers.types:
            raise InputError(f"tensor {name}: this library cannot write {target.name}")
        if len(tensor.shape) > _MOST_DIMENSIONS:
            raise InputError(
                f"tensor {name}: {len(tensor.shape)} dimensions, llama-quantize quantizes at most {_MOST_DIMENSIONS}"
            )


def _pieces(job: Job) -> Iterator[_Piece]:
    for tensor in written_order(job):
        target = job.written[tensor.name]
        n_rows = tensor.n_elements // tensor.row_length
        weights = None if target is tensor.qtype else job.weights(tensor)
        matrix_rows = n_rows if target is tensor.qtype else tensor.shape[1]
        step = max(1, _PIECE_WEIGHTS // tensor.row_length)
        written = tensor_bytes(target, tensor.shape)
        padding = pad(written, GGUF_DEFAULT_ALIGNMENT) - written
        for matrix, start in enumerate(range(0, n_rows, matrix_rows)):
            end = start + matrix_rows
            importance = None if weights is None else weights[matrix]
            for first in range(start, end, step):
                count = min(step, end - first)
                yield _Piece(tensor, target, first, count, importance, padding if first + count == n_rows else 0)


def _packed_in_order(job: Job, quantizers: RowQuantizers, threads: int) -> Iterator[tuple[_Piece, Bytes]]:
    packed = Threads(threads).run(lambda piece, _: (piece, piece.packed(quantizers)), _pieces(job), lambda _: None)
    with contextlib.closing(packed):
        for _, done in packed:
            yield done
