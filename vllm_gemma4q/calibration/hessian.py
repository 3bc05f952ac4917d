"""Sums of x x^T, of which one half is computed and kept: the other is its mirror.

That is half the work and half the memory, so that a part's sum and the total of the parts before it take what one
matrix takes whole.

Layout: float32, bands of 1024 rows behind each other, each from its diagonal to the last column: band j of a matrix of
`width` is [rows, width - 1024 j]. Bands and blocks of rows are fixed, so that the order of additions is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from vllm_gemma4q.calibration.statistics import Array

_BAND = 1024
_ROWS = 512


class HalfHessian:
    """One sum. `values` is its half on the device, see the module's docstring."""

    def __init__(self, width: int, device: torch.device):
        self.values = torch.zeros(sum(rows * columns for _, rows, columns in _bands(width)), device=device)
        self._bands = _views(self.values, width)

    def add(self, rows: torch.Tensor) -> None:
        """Add rows, [n, width], any float dtype."""
        for block in torch.split(rows.detach(), _ROWS):
            values = block.float()
            for start, band in self._bands:
                band.addmm_(values[:, start : start + len(band)].T, values[:, start:])


@dataclass(frozen=True, eq=False)
class Mirrored:
    """A whole matrix, F32 [width, width], from its half [n]: to be written without being in memory."""

    half: Array
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.width, self.width

    @property
    def dtype(self) -> np.dtype[np.float32]:
        return np.dtype(np.float32)

    def blocks(self) -> Iterator[Array]:
        """Its rows, from the first to the last, 1024 at a time."""
        bands = _views(torch.from_numpy(self.half), self.width)
        for start, band in bands:
            mirrored = [earlier[:, start - first :][:, : len(band)].T for first, earlier in bands if first < start]
            yield torch.cat([*mirrored, band], dim=1).numpy()


def _bands(width: int) -> Iterator[tuple[int, int, int]]:
    """(first row, rows, columns) of each."""
    for start in range(0, width, _BAND):
        yield start, min(_BAND, width - start), width - start


def _views(values: torch.Tensor, width: int) -> list[tuple[int, torch.Tensor]]:
    """(first row, [rows, columns]) of each band."""
    shapes = list(_bands(width))
    parts = torch.split(values, [rows * columns for _, rows, columns in shapes])
    return [(start, part.view(rows, columns)) for (start, rows, columns), part in zip(shapes, parts, strict=True)]
