"""Watching one decoder layer: hooks that send what enters its linears, and what its router chooses, to the sums."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from vllm_gemma4q.architecture import TextArchitecture
from vllm_gemma4q.calibration.accumulate import ExpertSums, InputSums, RoutingSums
from vllm_gemma4q.calibration.experts import Routed
from vllm_gemma4q.calibration.statistics import Array, as_arrays

# Linears that read the same activations: recorded at the first.
_SHARED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
ROUTER = "router.proj"
FUSED = ("experts.gate_up_proj", "experts.down_proj")


def linears(architecture: TextArchitecture, index: int) -> dict[str, str]:
    """All linears of one layer by their path in it, each with the path that its set of inputs is stored under."""
    shared = {path: group[0] for group in _SHARED for path in group}
    if not architecture.layers[index].has_value:
        del shared["self_attn.v_proj"]
    return shared if architecture.num_experts is None else {**shared, **{path: path for path in (ROUTER, *FUSED)}}


class Recorder:
    """Sums of one layer over some samples.

    Args:
        layer: a decoder layer of `Decoder.layer`.
        name: its module in the checkpoint.
        paths: of the linears to record, see `linears`.
        n_samples: how many will run.
        hessians: also sum x x^T.
    """

    def __init__(self, layer: Any, name: str, paths: Iterable[str], n_samples: int, hessians: bool = False):
        self._layer, self._name = layer, name
        device = next(layer.parameters()).device
        self._inputs: dict[str, InputSums] = {}
        for path in dict.fromkeys(paths):
            fused = path in FUSED
            shape = (layer.get_parameter(path) if fused else layer.get_submodule(path).weight).shape
            n, width = shape[0] if fused else 1, shape[-1]
            self._inputs[path] = InputSums(f"{name}.{path}", n, width, device, hessians)
        self._routing: _Routing | None = None
        if layer.enable_moe_block:
            self._routing = _Routing(layer, ExpertSums(*(self._inputs[path] for path in FUSED)), n_samples)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Samples run within are recorded."""
        handles = [
            self._layer.get_submodule(path).register_forward_pre_hook(_adder(sums))
            for path, sums in self._inputs.items()
            if path not in FUSED
        ]
        if self._routing is not None:
            handles += self._routing.hooks()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if self._routing is not None:
                self._layer.experts.watch = None  # a cycle would keep the layer in memory beside the next

    def start(self, sample: int) -> None:
        """Say which sample runs next."""
        if self._routing is not None:
            self._routing.sample = sample

    def arrays(self) -> dict[str, Array]:
        """All sums by their names in the file, Hessians as their halves. Raises InputError: an input was not finite."""
        arrays: dict[str, Array] = {}
        for sums in self._inputs.values():
            arrays |= sums.arrays()
        if self._routing is not None:
            arrays |= as_arrays(f"{self._name}.experts", self._routing.sums.result())
        return arrays


class _Routing:
    """Collects one sample's choices as the layer computes them; they are complete when the experts' norm has run."""

    def __init__(self, layer: Any, experts: ExpertSums, n_samples: int):
        self._layer, self._experts = layer, experts
        self.sums = RoutingSums(layer.config.num_experts, n_samples)
        self.sample = 0
        self._before: torch.Tensor
        self._chosen: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        self._norms: torch.Tensor

    def hooks(self) -> list[Any]:
        self._layer.experts.watch = self._routed
        return [
            self._layer.pre_feedforward_layernorm.register_forward_pre_hook(self._enter),
            self._layer.router.register_forward_hook(self._choose),
            self._layer.post_feedforward_layernorm_2.register_forward_hook(self._finish),
        ]

    def _enter(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._before = args[0][0].float()

    def _choose(self, module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
        probabilities, gates, index = output
        self._chosen = probabilities, index, gates

    def _routed(self, routed: Routed) -> None:
        self._experts.add(routed)
        self._norms = routed.norms

    def _finish(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        contributions = 1 - functional.cosine_similarity(self._before, self._before + output[0].float(), dim=-1)
        self.sums.add(self.sample, *self._chosen, self._norms, contributions)


def _adder(sums: InputSums) -> Any:
    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        sums.add(args[0].reshape(-1, args[0].shape[-1]))

    return hook
