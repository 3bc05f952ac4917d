"""One part of the samples through one layer, or through the final norm: here, or as the task of a worker.

A task reads what enters its part and writes what leaves it and its sums, as files of the work folder that the caller
gives their names: an attempt that dies leaves nothing that could be taken for a part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from gguf_mixed.tasks import Attempt
from vllm_gemma4q.calibration.accumulate import InputSums
from vllm_gemma4q.calibration.activations import Layout, StoredActivations
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.recorder import Recorder, linears
from vllm_gemma4q.calibration.statistics import LM_HEAD, Array
from vllm_gemma4q.calibration.work import write_unnamed_part
from vllm_gemma4q.checkpoint.run import FinishedFile

Progress = Callable[[int], object]


class Entering(Protocol):
    """What enters a layer, by sample of the part."""

    def get(self, sample: int) -> torch.Tensor:
        """[tokens, width]."""


class Leaving(Protocol):
    """Takes what leaves it."""

    def put(self, sample: int, values: torch.Tensor) -> None:
        """Values are [tokens, width]."""


class Embedded:
    """What enters the first layer: embeddings, made when they are asked for."""

    def __init__(self, decoder: Decoder, samples: Sequence[Sequence[int]]):
        self._decoder, self._samples = decoder, samples

    def get(self, sample: int) -> torch.Tensor:
        return self._decoder.embed(self._samples[sample])


def load(decoder: Decoder, index: int) -> Any:
    """A layer, or behind the last the final norm."""
    return decoder.layer(index) if index < decoder.n_layers else decoder.norm()


@torch.no_grad()
def run_layer(
    decoder: Decoder,
    layer: Any,
    n_samples: int,
    hessians: bool,
    entering: Entering,
    leaving: Leaving,
    progress: Progress,
) -> dict[str, Array]:
    """A part's samples through a layer of `load`; its sums by their names in the file, Hessians as their halves.

    Args:
        progress: called with tokens that have passed.

    Raises:
        InputError: what entered a linear was not finite.
    """
    paths = linears(decoder.architecture, layer.layer_idx).values()
    recorder = Recorder(layer, decoder.layer_name(layer.layer_idx), paths, n_samples, hessians)
    with recorder.watching():
        for sample in range(n_samples):
            recorder.start(sample)
            hidden = entering.get(sample)
            leaving.put(sample, decoder.run(layer, hidden.to(decoder.device)))
            progress(len(hidden))
    return recorder.arrays()


@torch.no_grad()
def run_norm(decoder: Decoder, norm: Any, n_samples: int, hessians: bool, entering: Entering) -> dict[str, Array]:
    """The same for what enters the output layer: the final norm's output."""
    sums = InputSums(LM_HEAD, 1, decoder.architecture.hidden_size, decoder.device, hessians)
    for sample in range(n_samples):
        sums.add(norm(entering.get(sample).to(decoder.device)))
    return sums.arrays()


@dataclass(frozen=True)
class Task:
    """A part for a worker.

    Attributes:
        decoder: the model: headers and configuration, as the caller has read them.
        index: of the layer; the number of layers: the final norm.
        samples: token ids.
        layout: of their activations.
        hessians: also sum x x^T.
        name: of the part with the sums, in the work folder.
        entering: the file of what enters; that of the first layer is not there, but made.
        leaving: the file of what leaves it, but the final norm's.
    """

    decoder: Decoder
    index: int
    samples: Sequence[Sequence[int]]
    layout: Layout
    hessians: bool
    name: str
    entering: Path
    leaving: Path

    def __str__(self) -> str:
        return f"{self.entering.with_name(self.name)}"


@dataclass(frozen=True)
class Made:
    """What a task has written, still without names."""

    file: FinishedFile
    attempt: str


def carry_out(task: Task, attempt: Attempt) -> Made:
    """What a worker does. Raises InputError: see `run_layer`; WriteError: the work folder cannot be written."""
    decoder, n_samples = task.decoder, len(task.samples)
    entering: Entering = Embedded(decoder, task.samples)
    if task.index:
        entering = StoredActivations(task.entering, task.layout)
    module = load(decoder, task.index)
    if task.index == decoder.n_layers:
        arrays = run_norm(decoder, module, n_samples, task.hessians, entering)
    else:
        leaving = StoredActivations(task.leaving, task.layout, new=True, attempt=attempt.name)
        arrays = run_layer(decoder, module, n_samples, task.hessians, entering, leaving, attempt.progress)
        leaving.sync()
    file = write_unnamed_part(task.leaving.parent, task.name, arrays, attempt.name)
    return Made(file, attempt.name)
