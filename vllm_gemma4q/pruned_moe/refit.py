"""Least squares after a prune: the experts that stay learn, in closed form, what the dropped ones contributed.

Two streams run side by side, the unpruned model's and the pruned one's. In each layer, with the pruned stream's own
inputs and routing, `down_proj` of one expert after the other is moved to bring the experts' sum nearer to the
unpruned one's. For an expert, tokens t routed to it, gates g, inner activations a [width] and what is left to explain,
r [hidden]:

    dW = argmin sum_t |r_t - g_t dW a_t|^2 + ridge |dW|^2,    r_t <- r_t - g_t dW a_t

The ridge is `RIDGE` times the mean diagonal of sum g^2 a a^T, so that an expert few tokens reach hardly moves. No
gradients, no steps to tune; later layers see, and mend, what earlier ones left. Text comes from the user and should be
what the model is for. The result lies in the work folder, one file a layer, in the source's dtype, and is resumable at
layer boundaries.

Cf. weight updates of OBS pruning (Hassibi 1993) and SparseGPT (arXiv 2301.00774); here whole experts are pruned.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gguf_mixed.drop_map import RetainedExperts
from vllm_gemma4q.calibration.activations import StoredActivations
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.experts import Experts
from vllm_gemma4q.calibration.forward import layout_of
from vllm_gemma4q.calibration.weights import dtype_of
from vllm_gemma4q.calibration.work import Work
from vllm_gemma4q.checkpoint import Checkpoint
from vllm_gemma4q.checkpoint.header import read_header
from vllm_gemma4q.pruned_moe.streams import Progress, only

RIDGE = 0.1
PASSES = 3  # of a layer: unpruned, pruned, pruned with what was found
_STREAMS = ("unpruned", "pruned")


class Refit:
    """One refit over all samples.

    Args:
        decoder: the unpruned model.
        retained: experts that stay.
        samples: token ids. One layer's inputs and residuals are in memory: 6 bytes x tokens x hidden size in BF16.
        work: where layers and activations go.
    """

    def __init__(
        self,
        decoder: Decoder,
        retained: RetainedExperts,
        samples: Sequence[Sequence[int]],
        work: Work,
    ):
        self._decoder, self._retained, self._samples, self._work = decoder, retained, samples, work
        self._layout = layout_of(decoder, samples)
        self._progress: Progress = lambda tokens: None

    @property
    def n_steps(self) -> int:
        """Tokens that pass a layer, every time they do: what `progress` adds up to."""
        return sum(map(self._steps, range(self._decoder.n_layers)))

    @torch.no_grad()
    def run(self, progress: Progress) -> None:
        """Write every layer's part, unless an earlier run has."""
        self._progress = progress
        n_layers = self._decoder.n_layers
        start = self._resumable()
        progress(sum(map(self._steps, range(start))))
        if start == 0:
            self._embed()
        for index in range(start, n_layers):
            self._layer(index)
            for stream in _STREAMS:
                self._work.drop_activations(_activations(stream, index))

    def _steps(self, index: int) -> int:
        is_pruned = len(self._retained.kept[index]) < self._retained.num_experts
        return self._layout.ends[-1] * (PASSES if is_pruned else PASSES - 1)

    def _embed(self) -> None:
        for stream in _STREAMS:
            target = self._open(stream, 0, new=True)
            for number, ids in enumerate(self._samples):
                target.put(number, self._decoder.embed(ids))
            target.complete()

    def _layer(self, index: int) -> None:
        decoder, kept = self._decoder, self._retained.kept[index]
        layer = decoder.layer(index)
        wanted: list[torch.Tensor] = []
        seen: list[Seen] = []
        is_pruned = len(kept) < self._retained.num_experts
        with watching(layer, lambda args, output: wanted.append(output.float())):
            self._run(layer, "unpruned", index)
        with (
            only(layer, kept),
            watching(layer, lambda args, output: seen.append(Seen(args[0], args[1], args[2], output.float()))),
        ):
            self._run(layer, "pruned", index, keep_result=not is_pruned)
        if is_pruned:
            refit(layer.experts, seen, wanted, kept)
            seen.clear()
            with only(layer, kept):
                self._run(layer, "pruned", index)
        module, weight = f"{decoder.layer_name(index)}.experts.down_proj", layer.experts.down_proj.data
        self._work.write_tensors(layer_part(index), {module: weight.to(dtype_of(decoder.checkpoint))})

    def _run(self, layer: Any, stream: str, index: int, keep_result: bool = True) -> None:
        """All samples of a stream through a layer."""
        source = self._open(stream, index)
        target = self._open(stream, index + 1, new=True) if keep_result else None
        for number, sample in enumerate(self._samples):
            result = self._decoder.run(layer, source.get(number).to(self._decoder.device))
            if target is not None:
                target.put(number, result)
            self._progress(len(sample))
        if target is not None:
            target.complete()

    def _open(self, stream: str, boundary: int, new: bool = False) -> StoredActivations:
        return StoredActivations(self._work.activations(_activations(stream, boundary)), self._layout, new)

    def _resumable(self) -> int:
        """The last boundary with both streams on disk and all parts before it; 0 to start anew."""
        for boundary in range(self._decoder.n_layers, 0, -1):
            before = all(self._work.has(layer_part(index)) for index in range(boundary))
            paths = [self._work.activations(_activations(stream, boundary)) for stream in _STREAMS]
            is_last = boundary == self._decoder.n_layers
            if before and (is_last or all(StoredActivations.is_whole(path, self._layout) for path in paths)):
                return boundary
        return 0


@dataclass(frozen=True)
class Seen:
    """What one layer's experts saw of one sample of T tokens: what entered, who was chosen, and the sum.

    Attributes:
        entered: [T, hidden].
        index: [T, K], experts chosen.
        gates: [T, K].
        sums: float32 [T, hidden], the experts' outputs times their gates.
    """

    entered: torch.Tensor
    index: torch.Tensor
    gates: torch.Tensor
    sums: torch.Tensor


@contextmanager
def watching(layer: Any, keep: Callable[[tuple[torch.Tensor, ...], torch.Tensor], object]) -> Iterator[None]:
    """Within, `keep` gets what each call of the layer's experts was given, and what it answered."""

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        keep(args, output)

    handle = layer.experts.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def refit(experts: Experts, seen: Sequence[Seen], wanted: Sequence[torch.Tensor], kept: Sequence[int]) -> None:
    """Move `down_proj` of the kept experts in place, one after the other.

    Args:
        experts: of one layer.
        seen: of the pruned stream, by sample.
        wanted: by sample, float32 [T, hidden], the unpruned stream's sums.
    """
    entered = torch.cat([part.entered for part in seen])
    index = torch.cat([part.index for part in seen])
    gates = torch.cat([part.gates for part in seen]).float()
    residual = torch.cat([target - part.sums for target, part in zip(wanted, seen, strict=True)])
    for expert in kept:
        tokens, place = (index == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        inner = experts.inner(entered[tokens], expert).float() * gates[tokens, place][:, None]
        change = _solve(inner, residual[tokens])
        weight = experts.down_proj.data[expert]
        moved = (weight.float() + change.T).to(weight.dtype)
        residual[tokens] -= inner @ (moved.float() - weight.float()).T
        weight.copy_(moved)


def _solve(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Ridge regression: [width, hidden] float32 of inputs [T, width] on outputs [T, hidden]."""
    gram = (inputs.T @ inputs).double()
    ridge = RIDGE * gram.diagonal().mean()
    if not bool(ridge > 0):
        return torch.zeros(inputs.shape[1], outputs.shape[1], device=inputs.device)
    gram.diagonal().add_(ridge)
    solution: torch.Tensor = torch.cholesky_solve((inputs.T @ outputs).double(), torch.linalg.cholesky(gram))
    return solution.float()


def refitted(work: Work, decoder: Decoder) -> Checkpoint:
    """`..experts.down_proj` [E, hidden, width] of every layer, as a finished refit left them."""
    paths = tuple(work.part(layer_part(index)) for index in range(decoder.n_layers))
    tensors = {name: tensor for path in paths for name, tensor in read_header(path).items()}
    return Checkpoint(work.folder, {}, paths, tensors)


def layer_part(index: int) -> str:
    """The part that holds one layer's experts."""
    return f"layer-{index:05d}"


def _activations(stream: str, boundary: int) -> str:
    return f"{stream}-{boundary:05d}"
