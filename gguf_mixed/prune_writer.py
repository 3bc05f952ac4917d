"""Write a pruned GGUF: the header, then the model's own bytes without those of the experts that go.

One block is in memory at a time. Not done: going on with a file that was interrupted, since copying is quick: it is
written anew.
"""

import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from tqdm import tqdm

from gguf_mixed.errors import InputError
from gguf_mixed.header import pad
from gguf_mixed.prune import Prune
from gguf_mixed.tensors import Tensor

BLOCK_BYTES = 1 << 23


def write_pruned(prune: Prune, path: Path, progress: bool = False) -> None:
    """Write the pruned model to `path`, flushed to the disk.

    Args:
        path: overwritten; left incomplete when this raises.
        progress: show a bar on the error stream.

    Raises:
        InputError: the model is truncated meanwhile or cannot be read, or the disk is full.
    """
    try:
        with (
            path.open("wb") as file,
            tqdm(total=prune.file_bytes, unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            for block in _blocks(prune):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{error.filename or path.name}: {error.strerror or error}") from error


def _blocks(prune: Prune) -> Iterator[bytes | memoryview]:
    """The file's content. A block is overwritten when the next is asked for."""
    yield prune.header
    if prune.inventory.header_only:
        return
    alignment = prune.inventory.headers[0].alignment
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for name, tensor in prune.inventory.tensors.items():
        with FileIO(tensor.path) as file:
            for start, n_bytes in _ranges(prune, tensor):
                file.seek(start)
                yield from _read(file, n_bytes, buffer, tensor)
        written = prune.tensors[name].n_bytes
        yield bytes(pad(written, alignment) - written)


def _ranges(prune: Prune, tensor: Tensor) -> Iterator[tuple[int, int]]:
    """First byte in the file, and length, of what stays of a tensor; experts side by side are one range."""
    kept = prune.kept(tensor)
    if kept is None:
        yield tensor.start, tensor.n_bytes
        return
    each = tensor.n_bytes // prune.mixture.num_experts
    first = 0
    for index, expert in enumerate(kept):
        if index + 1 == len(kept) or kept[index + 1] != expert + 1:
            count = index + 1 - first
            yield tensor.start + kept[first] * each, count * each
            first = index + 1


def _read(file: FileIO, n_bytes: int, buffer: memoryview, tensor: Tensor) -> Iterator[memoryview]:
    while n_bytes:
        count = file.readinto(buffer[: min(n_bytes, len(buffer))])
        if not count:
            raise InputError(f"{tensor.path.name}: truncated while it was read: tensor {tensor.name}")
        yield buffer[:count]
        n_bytes -= count
