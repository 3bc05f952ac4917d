"""One pass over the weights of a checkpoint: every linear's distribution of magnitudes, a few blocks in memory."""

import mmap
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from vllm_gemma4q.calibration.weights import TORCH_DTYPES
from vllm_gemma4q.checkpoint.direct_io import DirectReader, aligned_buffer
from vllm_gemma4q.checkpoint.header import DTYPE_BYTES
from vllm_gemma4q.checkpoint.rewrite import Progress
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.fp8_static.magnitudes import Magnitudes, WeightCounter
from vllm_gemma4q.linears import Linear

_BLOCK_BYTES = 4 << 20


def measure(groups: Iterable[Sequence[Linear]], progress: Progress) -> Iterator[list[Magnitudes]]:
    """The distribution of each linear of each group, in the groups' order.

    Args:
        progress: called with the number of bytes read.

    Raises:
        InputError: NaN or infinity in a weight, or a file that shrank.
    """
    with _Reader() as reader:
        for group in groups:
            yield [_count(linear, reader, progress) for linear in group]


def n_bytes(linear: Linear) -> int:
    """Size of a linear's rows in their file."""
    rows, columns = linear.shape
    return rows * columns * DTYPE_BYTES[linear.tensor.dtype]


def _count(linear: Linear, reader: "_Reader", progress: Progress) -> Magnitudes:
    dtype = TORCH_DTYPES[linear.tensor.dtype]
    counter = WeightCounter(dtype)
    for data in reader.blocks(linear):
        try:
            counter.add(torch.frombuffer(data, dtype=dtype))
        except ValueError as error:
            raise InputError(f"tensor {linear.tensor.name}, linear {linear.module}: {error}") from error
        progress(len(data))
    return counter.magnitudes()


class _Reader:
    """Blocks of linears, the next one being read while the caller looks at one."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "reader")
        self._files: dict[Path, DirectReader] = {}
        self._buffers = [aligned_buffer(_BLOCK_BYTES) for _ in range(2)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown()
        for file in self._files.values():
            file.close()

    def blocks(self, linear: Linear) -> Iterator[memoryview]:
        """The linear's bytes; each block is valid until the one after the next is asked for."""
        row_bytes = linear.tensor.row_length * DTYPE_BYTES[linear.tensor.dtype]
        first, end = (linear.tensor.start + row * row_bytes for row in (linear.first, linear.last))
        following: Future[memoryview] | None = None
        for number, start in enumerate(range(first, end, _BLOCK_BYTES)):
            current = following or self._submit(linear.tensor.path, start, end, number)
            after = start + _BLOCK_BYTES
            following = self._submit(linear.tensor.path, after, end, number + 1) if after < end else None
            yield current.result()

    def _submit(self, path: Path, start: int, end: int, number: int) -> "Future[memoryview]":
        return self._thread.submit(self._read, path, start, min(start + _BLOCK_BYTES, end), self._buffers[number % 2])

    def _read(self, path: Path, start: int, stop: int, buffer: mmap.mmap) -> memoryview:
        if path not in self._files:
            self._files[path] = DirectReader(path)
        return self._files[path].read(start, stop, buffer)
