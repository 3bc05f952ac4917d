"""The streamed forward pass: each layer is loaded once, runs all samples, and is dropped before the next.

Between layers all samples' activations are kept, in memory up to a limit, else in the work folder. What lies in the
folder is where a killed run goes on: files always; memory is saved when the work since the last time is worth ten
times what saving takes. Layers done again give the same bytes.
"""

import time
from collections.abc import Callable, Sequence

import torch

from vllm_gemma4q.calibration.accumulate import InputSums
from vllm_gemma4q.calibration.activations import Activations, Layout, StoredActivations
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.recorder import Recorder, linears
from vllm_gemma4q.calibration.statistics import LM_HEAD, as_arrays
from vllm_gemma4q.calibration.work import Work

Progress = Callable[[int], object]
HEAD = "head"
_WORTH = 10


class Forward:
    """One pass over all samples.

    Args:
        decoder: the model.
        samples: token ids.
        work: where parts and activations go.
        limit: bytes of activations to keep in memory.
        hessians: also sum x x^T.
        kept: samples whose input to every layer stays in the work folder, for a backward pass.
        progress: called with tokens that have passed a layer.
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
    ):
        self._decoder, self._samples, self._work = decoder, samples, work
        self._hessians, self._kept, self._progress = hessians, kept, progress
        self._layout = layout_of(decoder, samples)
        self._in_memory = self._layout.n_bytes <= limit
        self._save_seconds = 0.0
        self._saved_at = time.monotonic()

    @torch.no_grad()
    def run(self) -> None:
        """Write a part for each layer and one for the output layer, unless an earlier run has."""
        n_layers, n_tokens = self._decoder.n_layers, self._layout.ends[-1]
        start = n_layers if self._work.has(HEAD) else self._resumable()
        self._progress(start * n_tokens)
        if self._work.has(HEAD):
            return
        current = self._start_at(start)
        for index in range(start, n_layers):
            current = self._layer(index, current)
        self._output(current)

    def _start_at(self, boundary: int) -> Activations | StoredActivations:
        path = self._work.activations(_hidden(boundary))
        if boundary and not self._in_memory:
            return StoredActivations(path, self._layout)
        current = self._new(boundary)
        if boundary:
            assert isinstance(current, Activations)
            current.load(path)
            return current
        for number, ids in enumerate(self._samples):
            current.put(number, self._decoder.embed(ids))
        if isinstance(current, StoredActivations):
            current.complete()
        return current

    def _layer(self, index: int, source: Activations | StoredActivations) -> Activations | StoredActivations:
        """All samples through one layer; in memory the result takes the place of what entered."""
        decoder, target = self._decoder, source if self._in_memory else self._new(index + 1)
        layer = decoder.layer(index)
        paths = linears(decoder.architecture, index).values()
        recorder = Recorder(layer, decoder.layer_name(index), paths, len(self._samples), self._hessians)
        self._keep(index, source)
        with recorder.watching():
            for number in range(len(self._samples)):
                recorder.start(number)
                hidden = source.get(number)
                target.put(number, decoder.run(layer, hidden.to(decoder.device)))
                self._progress(len(hidden))
        if isinstance(target, StoredActivations):
            target.complete()
        self._work.write_part(layer_part(index), recorder.arrays())
        self._make_resumable(index + 1, target)
        return target

    def _make_resumable(self, boundary: int, current: Activations | StoredActivations) -> None:
        if isinstance(current, Activations):
            started = time.monotonic()
            if started - self._saved_at < _WORTH * self._save_seconds:
                return
            current.save(self._work.activations(_hidden(boundary)))
            self._saved_at = time.monotonic()
            self._save_seconds = self._saved_at - started
        for earlier in range(boundary):
            self._work.drop_activations(_hidden(earlier))

    def _output(self, current: Activations | StoredActivations) -> None:
        """What enters the output layer: the final norm's output."""
        width, device = self._decoder.architecture.hidden_size, self._decoder.device
        norm, sums = self._decoder.norm(), InputSums(LM_HEAD, 1, width, device, self._hessians)
        for number in range(len(self._samples)):
            sums.add(norm(current.get(number).to(device)))
        self._keep(self._decoder.n_layers, current)
        hessian = None if sums.hessian is None else sums.hessian.cpu().numpy()
        self._work.write_part(HEAD, as_arrays(LM_HEAD, sums.result(), hessian))
        self._work.drop_activations(_hidden("*"))

    def _keep(self, index: int, source: Activations | StoredActivations) -> None:
        if self._kept:
            layout = layout_of(self._decoder, [self._samples[number] for number in self._kept])
            file = StoredActivations(self._work.activations(layer_input(index)), layout, new=True)
            for place, number in enumerate(self._kept):
                file.put(place, source.get(number))
            file.complete()

    def _new(self, boundary: int) -> Activations | StoredActivations:
        if self._in_memory:
            return Activations(self._layout)
        return StoredActivations(self._work.activations(_hidden(boundary)), self._layout, new=True)

    def _resumable(self) -> int:
        """The last layer boundary whose activations are on disk, with all parts before it; 0 to start anew."""
        for boundary in range(self._decoder.n_layers, 0, -1):
            before = all(self._work.has(layer_part(index)) for index in range(boundary))
            if before and StoredActivations.is_whole(self._work.activations(_hidden(boundary)), self._layout):
                return boundary
        return 0


def layout_of(decoder: Decoder, samples: Sequence[Sequence[int]]) -> Layout:
    """Of samples between two layers."""
    return Layout([len(sample) for sample in samples], decoder.architecture.hidden_size, decoder.dtype)


def layer_part(index: int) -> str:
    """The part that holds one layer's sums."""
    return f"layer-{index:05d}"


def layer_input(index: int) -> str:
    """The activations kept of what enters one layer; those that enter the final norm have the number of layers."""
    return f"input-{index:05d}"


def _hidden(boundary: int | str) -> str:
    return f"hidden-{boundary:05d}" if isinstance(boundary, int) else f"hidden-{boundary}"
