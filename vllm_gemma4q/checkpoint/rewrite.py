"""Stream a checkpoint through a plan of steps into new shards, holding a few blocks of rows in memory.

Without a transform a step's bytes are copied. With one, blocks of rows become one array per output: the first
is written as it comes, the others (scales) when the step ends, and behind them constants that the plan knows already.

Three stages overlap: a thread reads and hashes the source, the caller's thread transforms, a thread
hashes and writes. They share `_BUFFERS` blocks of memory that are allocated once: fresh memory for each
block would cost more in page faults than the arithmetic does.
"""

import contextlib
import math
import mmap
import queue
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_gemma4q.checkpoint.direct_io import DirectReader, aligned_buffer, fits
from vllm_gemma4q.checkpoint.hashing import HashingReader, HashingWriter
from vllm_gemma4q.checkpoint.header import DTYPE_BYTES
from vllm_gemma4q.checkpoint.run import Run
from vllm_gemma4q.checkpoint.steps import OutputTensor, Shard, Step
from vllm_gemma4q.errors import InputError

Progress = Callable[[int], object]

BLOCK_BYTES = 4 << 20
# One being read, one being transformed, its result, two being written.
_BUFFERS = 5
_ALIGNMENT = 64
_TORCH_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
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
    with contextlib.ExitStack() as stack:
        files: dict[Path, HashingReader | DirectReader] = {}
        for path in sorted({step.source.path for shard in shards for step in shard.steps} | set(hashed)):
            files[path] = HashingReader(path) if path in hashed else DirectReader(path)
            stack.callback(files[path].close)
        stack.enter_context(_one_torch_thread())
        reader = stack.enter_context(ThreadPoolExecutor(1, "reader"))
        writer = stack.enter_context(ThreadPoolExecutor(1, "writer"))
        pipeline = _Pipeline(reader, writer, files, progress)
        for shard in shards:
            if shard.name in run.finished:
                progress(sum(step.source_bytes for step in shard.steps))
                continue
            with run.writing(shard.name) as output:
                pipeline.write(shard, output)
            run.record(shard.name)
        whole = {path: file for path, file in files.items() if isinstance(file, HashingReader)}
        return {path: reader.submit(file.finish).result() for path, file in whole.items()}


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The three stages are the parallelism: more threads in the middle one only take cores from hashing and I/O."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
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


def _blocks(steps: Sequence[Step]) -> Iterator[_Block]:
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
    ):
        self._reader, self._writer = reader, writer
        self._files, self._progress = files, progress
        self._buffers: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        for _ in range(_BUFFERS):
            self._buffers.put(aligned_buffer(BLOCK_BYTES))

    def write(self, shard: Shard, output: HashingWriter) -> None:
        """Write a shard's header and tensors; returns when all bytes are with the operating system."""
        output.write(shard.header())
        blocks = _blocks(shard.steps)
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
            raise InputError(f"tensor {block.step.source.name}, from row {block.first_row}: {error}") from error
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
