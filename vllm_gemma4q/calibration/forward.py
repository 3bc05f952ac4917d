"""The streamed forward pass: each layer is loaded once, runs all samples, and is dropped before the next.

Samples are divided into parts, the same whoever runs them (see `fold`). One process runs them one after the other;
workers run each as a task (see `part`), with the layer in the memory of each of them.

Between layers all samples' activations are kept, in memory up to a limit, else in the work folder, a file a part; with
workers always there. What lies in the folder is where a killed run goes on, in either way: files always, and of a layer
the parts that workers have finished; memory is saved when the work since the last time is worth ten times what saving
takes. Layers done again give the same bytes.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gguf_mixed.tasks import Executor
from vllm_gemma4q.calibration.activations import Activations, Layout, StoredActivations
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.fold import divided, fold, whole
from vllm_gemma4q.calibration.part import Embedded, Task, carry_out, load, run_layer, run_norm
from vllm_gemma4q.calibration.statistics import Array
from vllm_gemma4q.calibration.work import Work

Progress = Callable[[int], object]
Hidden = Embedded | Activations | StoredActivations
HEAD = "head"
_WORTH = 10


class Forward:
    """One pass over all samples.

    Args:
        decoder: the model.
        samples: token ids.
        work: where parts and activations go.
        limit: bytes of activations to keep in memory, without workers.
        hessians: also sum x x^T.
        kept: samples whose input to every layer stays in the work folder, for a backward pass.
        progress: called with tokens that have passed a layer.
        workers: who runs the parts; None: this process.
    """

    def __init__(
        self,
        decoder: Decoder,
        samples: Sequence[Sequence[int]],
        work: Work,
        limit: int,
        hessians: bool = False,
        kept: Sequence[int] = (),
        progress: Progress = lambda tokens: None,
        workers: Executor | None = None,
    ):
        self._decoder, self._samples, self._work = decoder, samples, work
        self._hessians, self._kept, self._progress, self._workers = hessians, kept, progress, workers
        self._parts = divided(len(samples))
        self._layouts = [layout_of(decoder, self._ids(part)) for part in range(len(self._parts))]
        self._in_memory = workers is None and layout_of(decoder, samples).n_bytes <= limit
        self._save_seconds = 0.0
        self._saved_at = time.monotonic()

    def run(self) -> None:
        """Write a part for each layer and one for the output layer, unless an earlier run has."""
        n_layers = self._decoder.n_layers
        start = n_layers if self._work.has(HEAD) else self._resumable()
        self._progress(start * sum(map(len, self._samples)))
        if self._work.has(HEAD):
            return
        entering = self._start_at(start)
        for index in range(start, n_layers + 1):
            self._keep(index, entering)
            entering = self._run_parts(index, entering)
        self._work.drop_activations("hidden-*")

    def _start_at(self, boundary: int) -> list[Hidden]:
        if boundary == 0:
            return [Embedded(self._decoder, self._ids(part)) for part in range(len(self._parts))]
        return [self._there(boundary, part) for part in range(len(self._parts))]

    def _there(self, boundary: int, part: int) -> Activations | StoredActivations:
        """A part's activations from the work folder."""
        path, layout = self._path(boundary, part), self._layouts[part]
        if not self._in_memory:
            return StoredActivations(path, layout)
        loaded = Activations(layout)
        loaded.load(path)
        return loaded

    def _run_parts(self, index: int, entering: list[Hidden]) -> list[Hidden]:
        """All samples through one layer, or through the final norm, which nothing leaves; its part written."""
        total: dict[str, Array] = {}
        leaving = self._by_workers(index, total) if self._workers else self._here(index, entering, total)
        self._work.write_part(self._part(index), whole(total))
        for part in range(len(self._parts)):
            self._work.drop_part(self._sums(index, part))
        if leaving:
            self._make_resumable(index + 1, leaving)
        return leaving

    def _here(self, index: int, entering: list[Hidden], total: dict[str, Array]) -> list[Hidden]:
        """In this process, but for what workers have left."""
        decoder, leaving = self._decoder, list[Hidden]()
        module = load(decoder, index)
        for part, (samples, source) in enumerate(zip(self._parts, entering, strict=True)):
            if self._is_finished(index, part):
                self._progress(self._layouts[part].ends[-1] if index < decoder.n_layers else 0)
                fold(total, self._work.read_part(self._sums(index, part)))
                if index < decoder.n_layers:
                    leaving.append(self._there(index + 1, part))
                continue
            # No name for a part's sums here: they would be in memory beside the next.
            if index == decoder.n_layers:
                fold(total, run_norm(decoder, module, len(samples), self._hessians, source))
                continue
            target = self._new(index + 1, part, source)
            fold(total, run_layer(decoder, module, len(samples), self._hessians, source, target, self._progress))
            if isinstance(target, StoredActivations):
                target.complete()
            leaving.append(target)
        return leaving

    def _by_workers(self, index: int, total: dict[str, Array]) -> list[Hidden]:
        n_layers, n_parts, folded = self._decoder.n_layers, len(self._parts), 0
        left = [part for part in range(n_parts) if not self._is_finished(index, part)]
        if index < n_layers:
            self._progress(sum(self._layouts[part].ends[-1] for part in range(n_parts) if part not in left))
        tasks = [self._task(index, part) for part in left]
        assert self._workers is not None
        with contextlib.closing(self._workers.run(carry_out, tasks, self._progress)) as results:
            for place, made in results:
                leaving = tasks[place].leaving if index < n_layers else None
                self._work.take_part(made.file, made.attempt, leaving)
                while folded < n_parts and self._is_finished(index, folded):
                    fold(total, self._work.read_part(self._sums(index, folded)))
                    folded += 1
        for part in range(folded, n_parts):  # there were no tasks: an earlier run had finished them
            fold(total, self._work.read_part(self._sums(index, part)))
        return [self._there(index + 1, part) for part in range(n_parts)] if index < n_layers else []

    def _task(self, index: int, part: int) -> Task:
        return Task(
            self._decoder,
            index,
            self._ids(part),
            self._layouts[part],
            self._hessians,
            self._sums(index, part),
            entering=self._path(index, part),
            leaving=self._path(index + 1, part),
        )

    def _is_finished(self, index: int, part: int) -> bool:
        """Whether a worker has, in this run or one that it resumes."""
        is_there = StoredActivations.is_whole(self._path(index + 1, part), self._layouts[part])
        return self._work.has(self._sums(index, part)) and (is_there or index == self._decoder.n_layers)

    def _make_resumable(self, boundary: int, current: list[Hidden]) -> None:
        if self._in_memory:
            started = time.monotonic()
            if started - self._saved_at < _WORTH * self._save_seconds:
                return
            for part, activations in enumerate(current):
                assert isinstance(activations, Activations)
                activations.save(self._path(boundary, part))
            self._saved_at = time.monotonic()
            self._save_seconds = self._saved_at - started
        for earlier in range(boundary):
            self._work.drop_activations(f"{_hidden(earlier)}-*")

    def _keep(self, index: int, entering: list[Hidden]) -> None:
        if self._kept:
            layout = layout_of(self._decoder, [self._samples[number] for number in self._kept])
            file = StoredActivations(self._work.activations(layer_input(index)), layout, new=True)
            for place, number in enumerate(self._kept):
                part = next(part for part, samples in enumerate(self._parts) if number in samples)
                file.put(place, entering[part].get(number - self._parts[part].start))
            file.complete()

    def _new(self, boundary: int, part: int, source: Hidden) -> Activations | StoredActivations:
        """For what leaves a layer; in memory it takes the place of what entered."""
        if not self._in_memory:
            return StoredActivations(self._path(boundary, part), self._layouts[part], new=True)
        return source if isinstance(source, Activations) else Activations(self._layouts[part])

    def _resumable(self) -> int:
        """The last layer boundary whose activations are on disk, with all parts before it; 0 to start anew."""
        for boundary in range(self._decoder.n_layers, 0, -1):
            paths = [self._path(boundary, part) for part in range(len(self._parts))]
            if all(self._work.has(layer_part(index)) for index in range(boundary)) and all(
                StoredActivations.is_whole(path, layout) for path, layout in zip(paths, self._layouts, strict=True)
            ):
                return boundary
        return 0

    def _ids(self, part: int) -> Sequence[Sequence[int]]:
        return [self._samples[number] for number in self._parts[part]]

    def _part(self, index: int) -> str:
        return layer_part(index) if index < self._decoder.n_layers else HEAD

    def _sums(self, index: int, part: int) -> str:
        return f"{self._part(index)}-samples-{part:05d}"

    def _path(self, boundary: int, part: int) -> Path:
        return self._work.activations(f"{_hidden(boundary)}-{part:05d}")


def layout_of(decoder: Decoder, samples: Sequence[Sequence[int]]) -> Layout:
    """Of samples between two layers."""
    return Layout([len(sample) for sample in samples], decoder.architecture.hidden_size, decoder.dtype)


def layer_part(index: int) -> str:
    """The part that holds one layer's sums."""
    return f"layer-{index:05d}"


def layer_input(index: int) -> str:
    """The activations kept of what enters one layer; those that enter the final norm have the number of layers."""
    return f"input-{index:05d}"


def _hidden(boundary: int) -> str:
    return f"hidden-{boundary:05d}"
