"""All samples' activations between two layers, [tokens, width] each, in memory or in a file.

A file is read and written sample by sample and not mapped: mapped pages would count as the process's memory, while
what the system caches of a file is its own to give up.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch

from gguf_mixed.atomic_file import WriteError
from vllm_gemma4q.errors import InputError

_PARTIAL = ".partial"


@dataclass(frozen=True)
class Layout:
    """Which activations: `lengths`, tokens of each sample, by `width` channels of a dtype."""

    lengths: Sequence[int]
    width: int
    dtype: torch.dtype

    @cached_property
    def ends(self) -> list[int]:
        return [0, *accumulate(self.lengths)]

    @property
    def n_bytes(self) -> int:
        return self.offset(len(self.lengths))

    def offset(self, sample: int) -> int:
        """Bytes before a sample."""
        return self.ends[sample] * self.width * self.dtype.itemsize


class Activations:
    """One boundary between layers, in memory."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self._values = torch.zeros(layout.ends[-1], layout.width, dtype=layout.dtype)

    def get(self, sample: int) -> torch.Tensor:
        """[tokens, width], on the CPU; a view of what is kept."""
        return self._values[self.layout.ends[sample] : self.layout.ends[sample + 1]]

    def put(self, sample: int, values: torch.Tensor) -> None:
        self.get(sample).copy_(values)

    def save(self, path: Path) -> None:
        """Write a file that `load` and `StoredActivations` read."""
        file = StoredActivations(path, self.layout, new=True)
        for sample in range(len(self.layout.lengths)):
            file.put(sample, self.get(sample))
        file.complete()

    def load(self, path: Path) -> None:
        """Fill from a file."""
        file = StoredActivations(path, self.layout)
        for sample in range(len(self.layout.lengths)):
            self.put(sample, file.get(sample))


class StoredActivations:
    """The same in a file: one that is there, or a new one that has its name only after `complete`.

    A new one of an `attempt` of a worker lies at `partial_path`, until the caller takes it: see `Work.take_part`.
    """

    def __init__(self, path: Path, layout: Layout, new: bool = False, attempt: str = ""):
        self.path, self.layout = path, layout
        self._partial = partial_path(path, attempt)
        try:
            if attempt:  # what is left of those that were killed
                for left in path.parent.glob(f"{path.name}.*{_PARTIAL}"):
                    left.unlink(missing_ok=True)
            elif new:
                path.unlink(missing_ok=True)
            self._file = (self._partial if new else path).open("w+b" if new else "rb", buffering=0)
        except OSError as error:
            raise WriteError(f"{path}: cannot be opened: {error.strerror}") from error

    @staticmethod
    def is_whole(path: Path, layout: Layout) -> bool:
        """Whether a file of that size is there under its final name."""
        return path.is_file() and path.stat().st_size == layout.n_bytes

    def get(self, sample: int) -> torch.Tensor:
        """[tokens, width], on the CPU."""
        values = torch.empty(self.layout.lengths[sample], self.layout.width, dtype=self.layout.dtype)
        n_read = os.preadv(self._file.fileno(), [_bytes(values)], self.layout.offset(sample))
        if n_read != values.nbytes:
            raise InputError(
                f"{self.path}: ended early: got {n_read} bytes of sample {sample}, expected {values.nbytes}"
            )
        return values

    def put(self, sample: int, values: torch.Tensor) -> None:
        buffer = _bytes(values.detach().to("cpu", self.layout.dtype).contiguous())
        offset = self.layout.offset(sample)
        try:
            while buffer:
                n_written = os.pwrite(self._file.fileno(), buffer, offset)
                buffer, offset = buffer[n_written:], offset + n_written
        except OSError as error:
            raise WriteError(f"{self.path}: cannot be written: {error.strerror}") from error

    def sync(self) -> None:
        """Returns when all that was written is on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise WriteError(f"{self.path}: cannot be written: {error.strerror}") from error

    def complete(self) -> None:
        """Every sample is in: give the file its name."""
        self.sync()
        self._partial.replace(self.path)


def partial_path(path: Path, attempt: str = "") -> Path:
    """Where a file lies until it has its name."""
    return path.with_name(f"{path.name}{'.' if attempt else ''}{attempt}{_PARTIAL}")


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
