"""Errors of a GGUF's quantized tensors against an unquantized GGUF of the same model: ||W_hat - W||^2 / ||W||^2.

Rows are dequantized by the gguf package, some megabytes at a time. An error is one matrix's: experts have one each.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from gemma4q_kernels.ggml import FLOAT_TYPES, row_bytes
from gguf.quants import dequantize

from gguf_mixed.tensors import Inventory, Tensor
from vllm_gemma4q.errors import InputError

_CHUNK_WEIGHTS = 1 << 22


def pairs(quantized: Inventory, base: Inventory) -> list[tuple[Tensor, Tensor]]:
    """Quantized tensors and what they were made from.

    Raises:
        InputError: a file without weights, a base that is quantized or lacks a tensor, or has another shape.
    """
    for inventory in (quantized, base):
        if inventory.header_only:
            raise InputError(f"{inventory.path.name}: holds no weights, only a header: errors cannot be measured")
    found = []
    for name, tensor in quantized.tensors.items():
        if tensor.qtype in FLOAT_TYPES:
            continue
        other = base.tensors.get(name)
        if other is None:
            raise InputError(f"--base {base.path.name}: tensor {name}: got nothing (missing), expected its weights")
        if other.qtype not in FLOAT_TYPES or other.shape != tensor.shape:
            got, expected = f"{other.qtype.name} {list(other.shape)}", f"BF16, F16 or F32 {list(tensor.shape)}"
            raise InputError(f"--base {base.path.name}: tensor {name}: got {got}, expected {expected}")
        found.append((tensor, other))
    return found


def measure_errors(compared: list[tuple[Tensor, Tensor]], progress: Callable[[int], Any]) -> dict[str, list[float]]:
    """Errors by name, one for each matrix of a tensor.

    Args:
        progress: called with numbers of weights that were compared.

    Raises:
        InputError: a type that the gguf package cannot dequantize.
    """
    return {one.name: _errors(one, base, progress) for one, base in compared}


def _errors(one: Tensor, base: Tensor, progress: Callable[[int], Any]) -> list[float]:
    rows = one.n_elements // one.row_length // one.n_matrices
    step = max(1, _CHUNK_WEIGHTS // one.row_length)
    found = []
    for matrix in range(one.n_matrices):
        error = size = 0.0
        for first in range(matrix * rows, (matrix + 1) * rows, step):
            last = min((matrix + 1) * rows, first + step)
            expected = _values(base, first, last)
            with np.errstate(all="ignore"):  # a scale that is no number is shown on the page
                error += float(np.square(_values(one, first, last) - expected, dtype=np.float64).sum())
            size += float(np.square(expected, dtype=np.float64).sum())
            progress(expected.size)
        if size:
            found.append(error / size)
    return found


def _values(tensor: Tensor, first: int, last: int) -> npt.NDArray[np.float32]:
    """Rows `first` to `last` (excluded), all matrices' counted through."""
    n_bytes = row_bytes(tensor.qtype, tensor.row_length)
    start = tensor.start + first * n_bytes
    stored = np.fromfile(tensor.path, np.uint8, (last - first) * n_bytes, offset=start).reshape(last - first, n_bytes)
    try:
        values: npt.NDArray[np.float32] = dequantize(stored, tensor.qtype).astype(np.float32, copy=False)
    except NotImplementedError as error:
        raise InputError(f"tensor {tensor.name}: {tensor.qtype.name} weights cannot be read") from error
    return values
