"""Least squares after a prune: the experts that stay learn, in closed form, what the dropped ones contributed.

Two streams run side by side, the unpruned model's and the pruned one's. In each layer, with the pruned stream's own
inputs and routing, `down_proj` of one expert after the other is moved to bring the experts' sum nearer to the
unpruned one's. For an expert, tokens t routed to it, gates g, inner activations a [width] and what is left to explain,
r [hidden]:

    dW = argmin sum_t |r_t - g_t dW a_t|^2 + ridge |dW|^2,    r_t <- r_t - g_t dW a_t

The ridge is a share of the mean diagonal of sum g^2 a a^T: `RIDGE`, and on top `RIDGE_OF_FEW` x width / tokens, so that
an expert few tokens reach hardly moves (without it, a short text does more harm than good). No gradients, no steps to
tune; later layers see, and mend, what earlier ones left. Text comes from the user and should be what the model is for.
The result lies in the work folder, one file a layer, in the dtype of the source's layer, and is resumable at layer
boundaries.

Cf. weight updates of OBS pruning (Hassibi 1993) and SparseGPT (arXiv 2301.00774); here whole experts are pruned.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vllm_gemma4q.architecture import layer_of
from vllm_gemma4q.calibration.activations import StoredActivations
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.experts import Experts
from vllm_gemma4q.calibration.forward import layout_of
from vllm_gemma4q.calibration.weights import TORCH_DTYPES
from vllm_gemma4q.calibration.work import Work
from vllm_gemma4q.checkpoint import Checkpoint, TensorInfo
from vllm_gemma4q.checkpoint.header import read_header
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.pruned_moe.streams import Progress, Variant

RIDGE, RIDGE_OF_FEW = 0.1, 8.0
PASSES = 3  # of a layer: unpruned, pruned, pruned with what was found
_STREAMS = ("unpruned", "pruned")
_DOWN_PROJ = re.compile(r"\.experts\.(?:\d+\.)?down_proj(?:\.weight)?$")


class Refit:
    """One refit over all samples.

    Args:
        decoder: the unpruned model.
        variant: the prune, knobs included.
        samples: token ids. What enters one layer's experts, and what is left to explain, is in memory: 6 bytes x
            tokens x hidden size in BF16.
        work: where layers and activations go.

    Raises:
        InputError: experts are not stored in a float dtype, the same for all of a layer.
    """

    def __init__(self, decoder: Decoder, variant: Variant, samples: Sequence[Sequence[int]], work: Work):
        self._decoder, self._variant, self._samples, self._work = decoder, variant, samples, work
        self._layout = layout_of(decoder, samples)
        self._progress: Progress = lambda tokens: None
        self._stored = _stored_dtypes(decoder.checkpoint)

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
        self._drop_before(start)
        for index in range(start, n_layers):
            self._layer(index)
            self._drop_before(index + 1)

    def _steps(self, index: int) -> int:
        return self._layout.ends[-1] * (PASSES if self._variant.drops(index) else PASSES - 1)

    def _drop_before(self, boundary: int) -> None:
        """Activations that nothing reads any more; after the last layer, all."""
        stop = boundary + 1 if boundary == self._decoder.n_layers else boundary
        for stream in _STREAMS:
            for earlier in range(stop):
                self._work.drop_activations(_activations(stream, earlier))

    def _embed(self) -> None:
        for stream in _STREAMS:
            target = self._open(stream, 0, new=True)
            for number, ids in enumerate(self._samples):
                target.put(number, self._decoder.embed(ids))
            target.complete()

    def _layer(self, index: int) -> None:
        decoder, variant = self._decoder, self._variant
        layer, tensors = decoder.layer(index), {}
        if variant.drops(index):
            self._refit(layer, index)
            weight = layer.experts.down_proj.data
            tensors[_down_proj(decoder, index)] = weight.to(self._stored[index])
        else:
            self._run(layer, "unpruned", index)
        with variant.applied(layer, index):
            self._run(layer, "pruned", index)
        self._work.write_tensors(layer_part(index), tensors)

    def _refit(self, layer: Any, index: int) -> None:
        """Run the unpruned stream, see what the pruned one lacks, and move the layer's weights."""
        seen = Seen(self._layout.ends[-1], self._layout.width, layer)
        with watching(layer, seen.add_wanted):
            self._run(layer, "unpruned", index)
        with self._variant.applied(layer, index), watching(layer, seen.add_pruned):
            self._run(layer, "pruned", index, keep_result=False)
        if not refit(layer.experts, seen, self._variant.retained.kept[index]):
            name = _down_proj(self._decoder, index)
            raise InputError(f"tensor {name}: refit: the model's activations are not finite: try --dtype float32")

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


class Seen:
    """What one layer's experts saw of all T tokens: what entered, who was chosen, and what is left to explain.

    Attributes:
        entered: [T, hidden], in the pruned stream.
        index: int64 [T, K], experts chosen there.
        gates: [T, K].
        residual: float32 [T, hidden], the unpruned stream's sum of experts minus the pruned one's.
    """

    def __init__(self, n_tokens: int, width: int, layer: Any):
        weight = layer.experts.down_proj
        self.residual = torch.empty(n_tokens, width, device=weight.device)
        self.entered = torch.empty(n_tokens, width, dtype=weight.dtype, device=weight.device)
        self._index: list[torch.Tensor] = []
        self._gates: list[torch.Tensor] = []
        self._n_wanted = self._n_pruned = 0

    @property
    def index(self) -> torch.Tensor:
        return torch.cat(self._index)

    @property
    def gates(self) -> torch.Tensor:
        return torch.cat(self._gates)

    def add_wanted(self, args: tuple[torch.Tensor, ...], sums: torch.Tensor) -> None:
        """The next sample of the unpruned stream."""
        start, self._n_wanted = self._n_wanted, self._n_wanted + len(sums)
        self.residual[start : self._n_wanted] = sums

    def add_pruned(self, args: tuple[torch.Tensor, ...], sums: torch.Tensor) -> None:
        """The next sample of the pruned stream; the unpruned one has been through."""
        start, self._n_pruned = self._n_pruned, self._n_pruned + len(sums)
        self.residual[start : self._n_pruned] -= sums.float()
        entered, index, gates = args
        self.entered[start : self._n_pruned] = entered
        self._index.append(index)
        self._gates.append(gates)


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


def refit(experts: Experts, seen: Seen, kept: Sequence[int]) -> bool:
    """Move `down_proj` of the kept experts in place, one after the other; also `seen.residual`.

    Returns:
        Whether all that was seen was finite.
    """
    index, gates, residual = seen.index, seen.gates.float(), seen.residual
    if not all(bool(part.isfinite().all()) for part in (residual, gates)):
        return False
    for expert in kept:
        tokens, place = (index == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        inner = experts.inner(seen.entered[tokens], expert).float() * gates[tokens, place][:, None]
        change = _solve(inner, residual[tokens])
        weight = experts.down_proj.data[expert]
        moved = (weight.float() + change.T).to(weight.dtype)
        residual[tokens] -= inner @ (moved.float() - weight.float()).T
        weight.copy_(moved)
    return True


def _solve(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Ridge regression: [width, hidden] float32 of inputs [T, width] on outputs [T, hidden]."""
    gram = (inputs.T @ inputs).double()
    ridge = (RIDGE + RIDGE_OF_FEW * inputs.shape[1] / len(inputs)) * gram.diagonal().mean()
    if not bool(ridge > 0):
        return torch.zeros(inputs.shape[1], outputs.shape[1], device=inputs.device)
    gram.diagonal().add_(ridge)
    solution: torch.Tensor = torch.cholesky_solve((inputs.T @ outputs).double(), torch.linalg.cholesky(gram))
    return solution.float()


def _stored_dtypes(checkpoint: Checkpoint) -> dict[int, torch.dtype]:
    """Of every layer's `down_proj`."""
    found: dict[int, TensorInfo] = {}
    for name, tensor in checkpoint.tensors.items():
        layer = layer_of(name)
        if layer is None or _DOWN_PROJ.search(name) is None:
            continue
        first = found.setdefault(layer, tensor)
        if tensor.dtype != first.dtype:
            raise InputError(f"tensor {name}: refit: got {tensor.dtype}, expected {first.dtype} as {first.name} has")
        if tensor.dtype not in TORCH_DTYPES:
            raise InputError(f"tensor {name}: got {tensor.dtype}, expected one of {', '.join(TORCH_DTYPES)}")
    return {layer: TORCH_DTYPES[tensor.dtype] for layer, tensor in found.items()}


def refitted(work: Work, decoder: Decoder) -> Checkpoint:
    """`..experts.down_proj` [E, hidden, width] of every layer that loses experts, as a finished refit left them."""
    paths = tuple(work.part(layer_part(index)) for index in range(decoder.n_layers))
    tensors = {name: tensor for path in paths for name, tensor in read_header(path).items()}
    return Checkpoint(work.folder, {}, paths, tensors, work.digests)


def _down_proj(decoder: Decoder, index: int) -> str:
    return f"{decoder.layer_name(index)}.experts.down_proj"


def layer_part(index: int) -> str:
    """The part that holds one layer's experts."""
    return f"layer-{index:05d}"


def _activations(stream: str, boundary: int) -> str:
    return f"{stream}-{boundary:05d}"
