"""Stream a checkpoint through a plan of steps into new shards, holding a few blocks of rows in memory.

Without a transform a step's bytes are copied. With one, blocks of rows become one array per output: the first
is written as it comes, the others (scales) when the step ends, and behind them constants that the plan knows already.
A step that computes is held whole, alone, and with as many of torch's threads as the process has.

Three stages overlap: a thread reads and hashes the source, the caller's thread transforms, a thread
hashes and writes. They share `_BUFFERS` blocks of memory that are allocated once: fresh memory for each
block would cost more in page faults than the arithmetic does.
"""

import contextlib
import itertools
import math
import mmap
import queue
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gguf_mixed.tasks import TaskLost
from vllm_gemma4q.checkpoint.direct_io import DirectReader, aligned_buffer, fits
from vllm_gemma4q.checkpoint.hashing import HashingReader, HashingWriter
from vllm_gemma4q.checkpoint.header import DTYPE_BYTES
from vllm_gemma4q.checkpoint.run import Run
from vllm_gemma4q.checkpoint.steps import Computed, OutputTensor, Progress, Shard, Step
from vllm_gemma4q.errors import InputError

__all__ = ["BLOCK_BYTES", "Progress", "rewrite", "write_shard"]

BLOCK_BYTES = 4 << 20
# One being read, one being transformed, its result, two being written.
_BUFFERS = 5
_ALIGNMENT = 64
_TORCH_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I8": torch.int8,
    "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


def rewrite(shards: Sequence[Shard], run: Run, progress: Progress, hashed: Collection[Path]) -> dict[Path, str]:
    """Write every shard that `run` has not finished yet.

    Args:
        shards: from `pack`, sources in the order in which their bytes lie on disk.
        progress: called with the number of source bytes consumed.
        hashed: source files to be read and hashed as a whole; of others, only what steps name is read.

    Returns:
        SHA-256 of each of `hashed`.

    Raises:
        InputError: a transform refused a block, a source file changed its size, or the target cannot be written.
    """
    with _opened(shards, hashed, progress) as (pipeline, reader, files):
        for shard in shards:
            if shard.name in run.finished:
                progress(shard.source_bytes)
                continue
            with run.writing(shard.name) as output:
                notes = pipeline.write(shard, output)
            run.record(shard.name, notes)
        whole = {path: file for path, file in files.items() if isinstance(file, HashingReader)}
        return {path: reader.submit(file.finish).result() for path, file in whole.items()}


def write_shard(shard: Shard, output: HashingWriter, progress: Progress) -> dict[str, Any]:
    """Write one shard's bytes; returns its steps' notes. Raises InputError as `rewrite` does."""
    with _opened([shard], (), progress) as (pipeline, _, _):
        return pipeline.write(shard, output)


@contextlib.contextmanager
def _opened(
    shards: Iterable[Shard], hashed: Collection[Path], progress: Progress
) -> Iterator[tuple["_Pipeline", ThreadPoolExecutor, Mapping[Path, HashingReader | DirectReader]]]:
    """A pipeline over the sources of some shards, the thread that reads, and the sources."""
    with contextlib.ExitStack() as stack:
        files: dict[Path, HashingReader | DirectReader] = {}
        for path in sorted({step.source.path for shard in shards for step in shard.steps} | set(hashed)):
            files[path] = HashingReader(path) if path in hashed else DirectReader(path)
            stack.callback(files[path].close)
        threads = torch.get_num_threads()
        stack.enter_context(_torch_threads(1))
        reader = stack.enter_context(ThreadPoolExecutor(1, "reader"))
        writer = stack.enter_context(ThreadPoolExecutor(1, "writer"))
        yield _Pipeline(reader, writer, files, progress, threads), reader, files


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """One while blocks stream: the three stages are the parallelism, and more only take cores from hashing and I/O."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Block:
    """A byte range of one step's source."""

    step: Step
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        return self.stop == self.step.spans[-1][1]

    @property
    def first_row(self) -> int:
        source = self.step.source
        return (self.start - source.start) // (source.row_length * DTYPE_BYTES[source.dtype])


def _blocks(steps: Iterable[Step]) -> Iterator[_Block]:
    for step in steps:
        size = BLOCK_BYTES
        if step.transform is not None:
            row_bytes = step.source.row_length * DTYPE_BYTES[step.source.dtype]
            size = max(1, BLOCK_BYTES // row_bytes) * row_bytes
        for start, stop in step.spans:
            for position in range(start, max(stop, start + 1), size):
                yield _Block(step, position, min(position + size, stop))


class _Pipeline:
    """Read, transform and write shards through one set of buffers."""

    def __init__(
        self,
        reader: ThreadPoolExecutor,
        writer: ThreadPoolExecutor,
        files: Mapping[Path, HashingReader | DirectReader],
        progress: Progress,
        threads: int,
    ):
        self._reader, self._writer = reader, writer
        self._files, self._progress = files, progress
        self._threads = threads
        self._buffers: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        for _ in range(_BUFFERS):
            self._buffers.put(aligned_buffer(BLOCK_BYTES))

    def write(self, shard: Shard, output: HashingWriter) -> dict[str, Any]:
        """Write a shard's header and tensors; returns its steps' notes when all bytes are with the operating system."""
        notes: dict[str, Any] = {}
        output.write(shard.header())
        for computes, steps in itertools.groupby(shard.steps, key=lambda step: step.compute is not None):
            if not computes:
                self._stream(steps, output)
                continue
            for step in steps:
                notes |= self._compute(step, output)
        return notes

    def _compute(self, step: Step, output: HashingWriter) -> Mapping[str, Any]:
        """Carry out a step that needs all its rows; nothing else is read or written meanwhile."""
        assert step.compute is not None
        ((start, stop),) = step.spans
        block, buffer = _Block(step, start, stop), aligned_buffer(stop - start)
        data = self._reader.submit(self._files[step.source.path].read, start, stop, buffer).result()
        rows = torch.frombuffer(data, dtype=_TORCH_DTYPES[step.source.dtype]).view(-1, step.source.row_length)
        progress = _Counted(self._progress, stop - start)
        with _torch_threads(self._threads):
            try:
                computed = step.compute(rows, progress)
            except ValueError as error:
                raise _refused(block, error) from error
            except torch.OutOfMemoryError as error:  # of a GPU that others use, too
                raise TaskLost(
                    f"tensor {step.source.name}: the device's memory is full; run it again with more"
                ) from error
        for chunk in _checked(step, computed):
            output.write(chunk)
        progress.complete()
        return computed.notes

    def _stream(self, steps: Iterable[Step], output: HashingWriter) -> None:
        blocks = _blocks(steps)
        writes: deque[Future[None]] = deque()
        trailing: list[list[bytes]] = []
        try:
            following = self._submit_read(next(blocks, None))
            while following is not None:
                block, data, buffer = following.result()
                following = self._submit_read(next(blocks, None))
                chunks, filled = self._transform(block, data, buffer, trailing)
                writes.append(self._writer.submit(self._write, output, chunks, filled))
                while writes[0].done() and len(writes) > 1:
                    writes.popleft().result()
                self._progress(block.stop - block.start)
        finally:
            wait(writes)
        for done in writes:
            done.result()

    def _transform(
        self, block: _Block, data: memoryview, buffer: mmap.mmap, trailing: list[list[bytes]]
    ) -> tuple[list[memoryview | bytes], mmap.mmap]:
        """What to write for a block, and the buffer that holds it until it is written."""
        constants = [constant.data for constant in block.step.constants] if block.is_last else []
        if block.step.transform is None:
            return [data, *constants], buffer
        rows = torch.frombuffer(data, dtype=_TORCH_DTYPES[block.step.source.dtype])
        rows = rows.view(-1, block.step.source.row_length)
        target = self._buffers.get()
        target, spans, out = _outputs(block.step.outputs, len(rows), target)
        try:
            block.step.transform(rows, out)
        except ValueError as error:
            raise _refused(block, error) from error
        finally:
            self._buffers.put(buffer)
        first, *others = (memoryview(target)[start:stop] for start, stop in spans)
        trailing.append([bytes(other) for other in others])
        chunks: list[memoryview | bytes] = [first]
        if block.is_last:
            chunks += [part for column in zip(*trailing, strict=True) for part in column]
            trailing.clear()
        return chunks + constants, target

    def _submit_read(self, block: _Block | None) -> "Future[tuple[_Block, memoryview, mmap.mmap]] | None":
        return None if block is None else self._reader.submit(self._read, block)

    def _read(self, block: _Block) -> tuple[_Block, memoryview, mmap.mmap]:
        buffer = _at_least(block.stop - block.start, self._buffers.get())
        return block, self._files[block.step.source.path].read(block.start, block.stop, buffer), buffer

    def _write(self, output: HashingWriter, chunks: list[memoryview | bytes], buffer: mmap.mmap) -> None:
        try:
            for chunk in chunks:
                output.write(chunk)
        finally:
            self._buffers.put(buffer)


class _Counted:
    """Progress of one step, which in the end has consumed exactly its bytes."""

    def __init__(self, progress: Progress, total: int):
        self._progress, self._left = progress, total

    def __call__(self, n_bytes: int) -> None:
        count = min(n_bytes, self._left)
        self._left -= count
        if count:
            self._progress(count)

    def complete(self) -> None:
        """Report what has not been reported."""
        self(self._left)


def _refused(block: _Block, error: ValueError) -> InputError:
    return InputError(f"tensor {block.step.source.name}, from row {block.first_row}: {error}")


def _checked(step: Step, computed: Computed) -> Iterator[memoryview | bytes]:
    """The bytes of a step's outputs and constants, in order; a computation that breaks its promise is a bug."""
    for wanted, tensor in zip(step.outputs, computed.tensors, strict=True):
        assert (tensor.dtype, tuple(tensor.shape)) == (_TORCH_DTYPES[wanted.dtype], wanted.shape), wanted.name
        yield tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    yield from (constant.data for constant in step.constants)


def _at_least(size: int, buffer: mmap.mmap) -> mmap.mmap:
    """The buffer, or a larger one in its place: a single row may be longer than a block."""
    return buffer if fits(size, buffer) else aligned_buffer(size)


def _outputs(
    outputs: Sequence[OutputTensor], rows: int, buffer: mmap.mmap
) -> tuple[mmap.mmap, list[tuple[int, int]], list[torch.Tensor]]:
    """Tensors for `rows` rows of each output, laid out in a buffer: the buffer, byte spans, tensors."""
    shapes = [(rows, *output.shape[1:]) for output in outputs]
    spans, end = [], 0
    for output, shape in zip(outputs, shapes, strict=True):
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + math.prod(shape) * DTYPE_BYTES[output.dtype]
        spans.append((start, end))
    buffer = _at_least(end, buffer)
    tensors = [
        torch.frombuffer(memoryview(buffer)[start:stop], dtype=_TORCH_DTYPES[output.dtype]).view(shape)
        for (start, stop), output, shape in zip(spans, outputs, shapes, strict=True)
    ]
    return buffer, spans, tensors
