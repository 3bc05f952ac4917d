"""What a conversion is made of: steps, each from one source tensor to tensors of the output, packed into shards.

A step takes a whole source tensor, a range of its rows, or slices along its first axis, and yields one or more
output tensors that lie behind each other in the output. It copies, transforms block by block, or computes from all its
rows at once. `rewrite.py` carries steps out.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_gemma4q.checkpoint.header import DTYPE_BYTES, TensorInfo, write_header

Progress = Callable[[int], object]
Transform = Callable[[torch.Tensor, Sequence[torch.Tensor]], object]
Compute = Callable[[torch.Tensor, Progress], "Computed"]

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Constant:
    """A small tensor whose bytes are known before anything is read, such as a scale that was measured."""

    output: OutputTensor
    data: bytes


@dataclass(frozen=True, eq=False)
class Computed:
    """What a step made of all its rows.

    Attributes:
        tensors: one per output of the step, of its dtype and shape.
        notes: JSON values by a name that is the step's own; the journal keeps them for the manifest.
    """

    tensors: Sequence[torch.Tensor]
    notes: Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """What becomes of one source tensor, of its rows `first_row` to `last_row` (excluded), or of `slices` of it.

    `transform(rows, out)` turns a block `[r, row_length]` in the source's dtype into one tensor per output, of
    the output's dtype and of its shape but for r leading rows; it fills those it is given. A ValueError it raises
    is reported with the source tensor's name. `constants` are written behind the outputs; without rows and outputs
    they are all there is. `slices` are ranges of the first axis (start, stop), ascending, whose bytes become one
    output; no transform takes them.

    `compute(rows, progress)`, in the place of a transform, gets all rows at once, `[rows, row_length]`, may work long,
    and says now and then how many source bytes are done; its ValueError is reported likewise.
    Steps of different `group` never share a shard, so that what is done of a group survives a kill.
    """

    source: TensorInfo
    outputs: tuple[OutputTensor, ...]
    transform: Transform | None = None
    first_row: int = 0
    last_row: int | None = None
    constants: tuple[Constant, ...] = ()
    slices: tuple[tuple[int, int], ...] = ()
    compute: Compute | None = None
    group: str = ""

    def __post_init__(self) -> None:
        if self.slices and not self.is_copy:
            raise ValueError(f"{self.source.name}: slices are copied, got a transform")
        if self.transform is not None and self.compute is not None:
            raise ValueError(f"{self.source.name}: got a transform and a computation, expected one of them")
        if self.is_copy:
            self._check_copy()

    def _check_copy(self) -> None:
        """Bytes that go as they are must mean the same under their new name."""
        n_bytes = sum(output.n_bytes for output in self.outputs)
        if n_bytes != self.source_bytes:
            raise ValueError(f"{self.source.name}: copying {self.source_bytes} bytes to {n_bytes}")
        for output in self.outputs:
            if output.dtype != self.source.dtype:
                raise ValueError(f"{self.source.name}: copying {self.source.dtype} to {output.name} of {output.dtype}")

    @property
    def is_copy(self) -> bool:
        """Whether the source's bytes are written as they are."""
        return self.transform is None and self.compute is None

    @property
    def written(self) -> Iterator[OutputTensor]:
        """Every tensor that the step writes, in the order of the file."""
        yield from self.outputs
        yield from (constant.output for constant in self.constants)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Absolute byte ranges of what is read of the source, in its order; one unless there are slices."""
        source = self.source
        if self.slices:
            size = (source.end - source.start) // source.shape[0]
            return tuple((source.start + first * size, source.start + last * size) for first, last in self.slices)
        if self.last_row is None:
            return ((source.start, source.end),)
        row_bytes = source.row_length * DTYPE_BYTES[source.dtype]
        return ((source.start + self.first_row * row_bytes, source.start + self.last_row * row_bytes),)

    @property
    def source_bytes(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    @property
    def output_bytes(self) -> int:
        return sum(output.n_bytes for output in self.written)


@dataclass
class Shard:
    """One output file: its steps in order. `name` is set once the number of shards is known."""

    steps: list[Step] = field(default_factory=list)
    n_bytes: int = 0
    name: str = ""

    @property
    def outputs(self) -> Iterator[OutputTensor]:
        return (output for step in self.steps for output in step.written)

    @property
    def source_bytes(self) -> int:
        return sum(step.source_bytes for step in self.steps)

    def header(self) -> bytes:
        """What the file starts with; `n_bytes` of tensors follow."""
        return write_header((output.name, output.dtype, output.shape) for output in self.outputs)


def pack(steps: Sequence[Step], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Shard]:
    """Distribute steps over shards in order; a step is never split, so one larger than a shard stands alone."""
    shards = [Shard()]
    for step in steps:
        full = shards[-1].n_bytes + step.output_bytes > max_shard_bytes
        if shards[-1].steps and (full or shards[-1].steps[-1].group != step.group):
            shards.append(Shard())
        shards[-1].steps.append(step)
        shards[-1].n_bytes += step.output_bytes
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        shard.name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    return shards
