"""Stream a checkpoint through a plan of steps into new shards, holding a few blocks of rows in memory.

A step takes one source tensor, or a range of its rows, and yields one or more output tensors that lie
behind each other in the output. Without a transform the bytes are copied. With one, blocks of rows
become one array per output: the first is written as it comes, the others (scales) when the step ends.

Three stages overlap: a thread reads and hashes the source, the caller's thread transforms, a thread
hashes and writes. Peak memory is `_BUFFERS` blocks in and a few out, whatever the tensors' sizes.
"""

import contextlib
import hashlib
import os
import queue
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from vllm_gemma4q.checkpoint.header import DTYPE_BYTES, TensorInfo, write_header
from vllm_gemma4q.checkpoint.run import HashingFile, Run
from vllm_gemma4q.errors import InputError

Transform = Callable[[torch.Tensor], Sequence[torch.Tensor]]
Progress = Callable[[int], object]

MAX_SHARD_BYTES = 5_000_000_000
BLOCK_BYTES = 16 << 20
_BUFFERS = 4
_WRITES_AHEAD = 3
_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I8": torch.int8}


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Step:
    """What becomes of one source tensor, or of its rows `first_row` to `last_row` (excluded).

    `transform` maps a block `[r, row_length]` in the source's dtype to one tensor per output, each with r
    leading rows; a ValueError it raises is reported with the source tensor's name.
    """

    source: TensorInfo
    outputs: tuple[OutputTensor, ...]
    transform: Transform | None = None
    first_row: int = 0
    last_row: int | None = None

    @property
    def span(self) -> tuple[int, int]:
        """Absolute byte range of the source rows."""
        row_bytes = self.source.row_length * DTYPE_BYTES[self.source.dtype]
        if self.last_row is None:
            return self.source.start, self.source.end
        return self.source.start + self.first_row * row_bytes, self.source.start + self.last_row * row_bytes

    @property
    def output_bytes(self) -> int:
        return sum(output.n_bytes for output in self.outputs)


@dataclass
class Shard:
    """One output file: its steps in order. `name` is set once the number of shards is known."""

    steps: list[Step] = field(default_factory=list)
    n_bytes: int = 0
    name: str = ""


def pack(steps: Sequence[Step], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Shard]:
    """Distribute steps over shards in order; a step is never split, so one larger than a shard stands alone."""
    shards = [Shard()]
    for step in steps:
        if shards[-1].steps and shards[-1].n_bytes + step.output_bytes > max_shard_bytes:
            shards.append(Shard())
        shards[-1].steps.append(step)
        shards[-1].n_bytes += step.output_bytes
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        shard.name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    return shards


def rewrite(shards: Sequence[Shard], run: Run, progress: Progress) -> dict[str, str]:
    """Write every shard that `run` has not finished yet.

    Args:
        shards: from `pack`, sources in the order in which their bytes lie on disk.
        progress: called with the number of source bytes consumed.

    Returns:
        SHA-256 of each source file, by name.

    Raises:
        InputError: a transform refused a block, a source file changed its size, or the target cannot be written.
    """
    with contextlib.ExitStack() as stack:
        files: dict[Path, _SourceFile] = {}
        for path in sorted({step.source.path for shard in shards for step in shard.steps}):
            files[path] = _SourceFile(path)
            stack.callback(files[path].close)
        stack.enter_context(_one_torch_thread())
        reader = stack.enter_context(ThreadPoolExecutor(1, "reader"))
        writer = stack.enter_context(ThreadPoolExecutor(1, "writer"))
        for shard in shards:
            if shard.name in run.finished:
                progress(sum(stop - start for start, stop in (step.span for step in shard.steps)))
                continue
            with run.writing(shard.name) as output:
                _Pipeline(reader, writer, files, output, progress).write(shard)
            run.record(shard.name)
        return {path.name: reader.submit(file.finish).result() for path, file in files.items()}


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
        return self.stop == self.step.span[1]

    @property
    def first_row(self) -> int:
        source = self.step.source
        return (self.start - source.start) // (source.row_length * DTYPE_BYTES[source.dtype])


def _blocks(steps: Sequence[Step]) -> Iterator[_Block]:
    for step in steps:
        start, stop = step.span
        size = BLOCK_BYTES
        if step.transform is not None:
            row_bytes = step.source.row_length * DTYPE_BYTES[step.source.dtype]
            size = max(1, BLOCK_BYTES // row_bytes) * row_bytes
        for position in range(start, max(stop, start + 1), size):
            yield _Block(step, position, min(position + size, stop))


class _Pipeline:
    """Read, transform and write one shard."""

    def __init__(
        self,
        reader: ThreadPoolExecutor,
        writer: ThreadPoolExecutor,
        files: "Mapping[Path, _SourceFile]",
        output: HashingFile,
        progress: Progress,
    ):
        self._reader, self._writer = reader, writer
        self._files, self._output, self._progress = files, output, progress
        self._buffers: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        for _ in range(_BUFFERS):
            self._buffers.put(bytearray(BLOCK_BYTES))
        self._writes: deque[Future[None]] = deque()

    def write(self, shard: Shard) -> None:
        tensors = [(output.name, output.dtype, output.shape) for step in shard.steps for output in step.outputs]
        self._submit_write([memoryview(write_header(tensors))], None)
        blocks = _blocks(shard.steps)
        try:
            following = self._submit_read(next(blocks, None))
            trailing: list[list[memoryview]] = []
            while following is not None:
                block, buffer = following.result()
                following = self._submit_read(next(blocks, None))
                self._consume(block, buffer, trailing)
                self._progress(block.stop - block.start)
        finally:
            wait(self._writes)
        for done in self._writes:
            done.result()

    def _consume(self, block: _Block, buffer: bytearray, trailing: list[list[memoryview]]) -> None:
        data = memoryview(buffer)[: block.stop - block.start]
        if block.step.transform is None:
            self._submit_write([data], buffer)
            return
        rows = torch.frombuffer(data, dtype=_TORCH_DTYPES[block.step.source.dtype])
        try:
            first, *others = block.step.transform(rows.view(-1, block.step.source.row_length))
        except ValueError as error:
            raise InputError(f"tensor {block.step.source.name}, from row {block.first_row}: {error}") from error
        trailing.append([_bytes_of(other) for other in others])
        chunks = [_bytes_of(first)]
        if block.is_last:
            chunks += [part for column in zip(*trailing, strict=True) for part in column]
            trailing.clear()
        self._submit_write(chunks, None)
        self._buffers.put(buffer)

    def _submit_read(self, block: _Block | None) -> "Future[tuple[_Block, bytearray]] | None":
        return None if block is None else self._reader.submit(self._read, block)

    def _read(self, block: _Block) -> tuple[_Block, bytearray]:
        buffer, size = self._buffers.get(), block.stop - block.start
        if len(buffer) < size:
            buffer = bytearray(size)
        self._files[block.step.source.path].read(block.start, memoryview(buffer)[:size])
        return block, buffer

    def _submit_write(self, chunks: list[memoryview], buffer: bytearray | None) -> None:
        while len(self._writes) >= _WRITES_AHEAD:
            self._writes.popleft().result()
        self._writes.append(self._writer.submit(self._write, chunks, buffer))

    def _write(self, chunks: list[memoryview], buffer: bytearray | None) -> None:
        try:
            for chunk in chunks:
                self._output.write(chunk)
        finally:
            if buffer is not None:
                self._buffers.put(buffer)


class _SourceFile:
    """One source file, read in ranges and hashed on the way; what a plan skips is read for the hash alone."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("rb", buffering=0)
        self._sha256 = hashlib.sha256()
        self._hashed = 0

    def read(self, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `start`."""
        self._hash_up_to(start)
        self._file.seek(start)
        filled = 0
        while filled < len(into):
            count = self._file.readinto(into[filled:])
            if not count:
                raise InputError(f"{self._path.name}: truncated while it was read, at byte {start + filled}")
            filled += count
        if start + len(into) > self._hashed:
            self._sha256.update(into[self._hashed - start :])
            self._hashed = start + len(into)

    def finish(self) -> str:
        """SHA-256 of the whole file."""
        self._hash_up_to(os.fstat(self._file.fileno()).st_size)
        return self._sha256.hexdigest()

    def close(self) -> None:
        self._file.close()

    def _hash_up_to(self, position: int) -> None:
        self._file.seek(self._hashed)
        while self._hashed < position:
            data = self._file.read(min(BLOCK_BYTES, position - self._hashed))
            if not data:
                raise InputError(f"{self._path.name}: truncated while it was read, at byte {self._hashed}")
            self._sha256.update(data)
            self._hashed += len(data)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
