"""Are two tensors the same bytes, and is a quantized weight one of the base's? A few blocks in memory."""

import contextlib
import mmap
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch

from vllm_gemma4q.checkpoint.direct_io import DirectReader, aligned_buffer
from vllm_gemma4q.checkpoint.header import DTYPE_BYTES, TensorInfo
from vllm_gemma4q.linears import Linear

_BLOCK_BYTES = 4 << 20
_ROWS = 8
_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8,
}  # fmt: skip


@dataclass(frozen=True)
class Span:
    """Absolute bytes of a file."""

    path: Path
    start: int
    end: int


def span(tensor: TensorInfo, first: int = 0, last: int | None = None) -> Span:
    """The bytes of a tensor, or of its rows `first` to `last` (excluded)."""
    if last is None:
        return Span(tensor.path, tensor.start, tensor.end)
    row_bytes = tensor.row_length * DTYPE_BYTES[tensor.dtype]
    return Span(tensor.path, tensor.start + first * row_bytes, tensor.start + last * row_bytes)


def span_of(linear: Linear) -> Span:
    """The bytes of a linear's rows."""
    return span(linear.tensor, linear.first, linear.last)


class Files:
    """Files that are open for reading while they are compared."""

    def __init__(self) -> None:
        self._open: dict[Path, DirectReader] = {}
        self._buffers: list[mmap.mmap] = [aligned_buffer(_BLOCK_BYTES) for _ in range(2)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for file in self._open.values():
            file.close()

    def are_same(self, one: Span, other: Span) -> bool:
        """Whether two spans hold the same bytes."""
        if one.end - one.start != other.end - other.start:
            return False
        with contextlib.closing(self._blocks(one, 0)) as left, contextlib.closing(self._blocks(other, 1)) as right:
            return all(_equal(*blocks) for blocks in zip(left, right, strict=True))

    def values(self, tensor: TensorInfo, wanted: Span) -> torch.Tensor:
        """float32 values of a small part of a tensor, as stored."""
        data = bytearray(b"".join(bytes(block) for block in self._blocks(wanted, 0)))
        return torch.frombuffer(data, dtype=_DTYPES[tensor.dtype]).float()

    def _blocks(self, wanted: Span, buffer: int) -> Generator[memoryview, None, None]:
        if wanted.path not in self._open:
            self._open[wanted.path] = DirectReader(wanted.path)
        for start in range(wanted.start, wanted.end, _BLOCK_BYTES):
            stop = min(start + _BLOCK_BYTES, wanted.end)
            yield self._open[wanted.path].read(start, stop, self._buffers[buffer])


def _equal(one: memoryview, other: memoryview) -> bool:
    # memoryview's own comparison looks at one byte at a time.
    return bool(np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)))


def deviation(files: Files, weight: Linear, scale: TensorInfo, base: Linear) -> float | None:
    """Root mean square of (dequantized weight - base's) over that of the base's, from a few rows in the middle.

    Args:
        scale: one value, or one a row; None is returned for others (blocks), and for dtypes that are packed.
    """
    rows = weight.last - weight.first
    if weight.tensor.dtype not in _DTYPES or scale.dtype not in _DTYPES or not rows:
        return None
    count = int(np.prod(scale.shape, dtype=np.int64))
    if count not in (1, rows):
        return None
    middle = max(0, rows // 2 - _ROWS // 2)
    last = min(rows, middle + _ROWS)
    factors = files.values(scale, span(scale))
    factors = factors if count == 1 else factors[middle:last, None]
    columns = weight.tensor.row_length
    codes = files.values(weight.tensor, span(weight.tensor, weight.first + middle, weight.first + last))
    expected = files.values(base.tensor, span(base.tensor, base.first + middle, base.first + last))
    difference = codes.view(-1, columns) * factors - expected.view(-1, columns)
    size = float(expected.double().square().sum())
    return float(difference.double().square().sum() / size) ** 0.5 if size else None
