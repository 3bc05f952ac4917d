"""Rows of a tensor in its file: drawn by weight, read, cut into chunks."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from gemma4q_kernels.ggml import GGMLQuantizationType, row_bytes

from gguf_mixed.tensors import Tensor

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_CHUNK_ROWS = 256


def sampled_rows(weights: Doubles, n_rows: int, generator: np.random.Generator) -> tuple[Integers, Doubles]:
    """Draw rows with a chance in proportion to their weight, one from each part of equal weight.

    Args:
        weights: float64 [rows], not negative.
        n_rows: rows to draw; all are taken where there are no more.
        generator: of the draw.

    Returns:
        int64 [m], distinct rows ascending, and float64 [m], what each counts: its draws over their expected number.
    """
    if len(weights) <= n_rows or not weights.sum() > 0:
        kept = np.arange(min(len(weights), n_rows))
        return kept, np.ones(len(kept))
    edges = np.cumsum(weights) / weights.sum()
    points = (np.arange(n_rows) + generator.random(n_rows)) / n_rows
    # Rounding may leave the last edge below 1, and a point on an edge belongs to the next row of any weight.
    drawn = np.minimum(np.searchsorted(edges, points, side="right"), np.flatnonzero(weights)[-1])
    rows, draws = np.unique(drawn, return_counts=True)
    return rows, draws / (n_rows * weights[rows] / weights.sum())


def read_rows(tensor: Tensor, rows: Integers) -> Floats:
    """float32 [len(rows), row_length]: those rows, counted over all matrices of the tensor."""
    n_bytes = row_bytes(tensor.qtype, tensor.row_length)
    n_rows = tensor.n_elements // tensor.row_length
    stored = np.memmap(tensor.path, np.uint8, "r", tensor.start, (n_rows, n_bytes))
    picked = np.ascontiguousarray(stored[rows])
    if tensor.qtype is GGMLQuantizationType.BF16:
        return (picked.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return picked.view("<f2" if tensor.qtype is GGMLQuantizationType.F16 else "<f4").astype(np.float32)


def chunks(rows: Integers, n_rows: int) -> Iterator[tuple[int, slice]]:
    """(matrix, slice of `rows`): ascending rows cut where the matrix changes, and to a size that fits in caches."""
    for matrix in np.unique(rows // n_rows):
        start, end = np.searchsorted(rows, (matrix * n_rows, (matrix + 1) * n_rows))
        for first in range(start, end, _CHUNK_ROWS):
            yield int(matrix), slice(first, min(first + _CHUNK_ROWS, end))
