"""Several variants of one model side by side, one decoder layer in memory at a time.

Variants differ in which experts the router may choose: a dropped expert's logit is set to -inf, which gives what
slicing gives, exactly. They may also have a `down_proj` of their own (see `refit`). Each layer is loaded once and runs
all samples of all variants before the next is loaded.
Activations lie in memory up to a limit, else in a temporary folder. Not resumable: a run is a few forward passes.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gguf_mixed.drop_map import RetainedExperts
from vllm_gemma4q.calibration.activations import Activations, StoredActivations
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.forward import layout_of
from vllm_gemma4q.calibration.weights import read_rows
from vllm_gemma4q.checkpoint import TensorInfo

Progress = Callable[[int], object]
Hidden = Activations | StoredActivations


@dataclass(frozen=True)
class Variant:
    """One way to prune a model.

    Attributes:
        retained: experts that stay.
        down_proj: tensors by name, [E, hidden, width], that take the place of the model's, where there are some.
    """

    retained: RetainedExperts
    down_proj: Mapping[str, TensorInfo] = field(default_factory=dict)

    def changes(self, index: int) -> bool:
        """Whether a layer differs from the unpruned model's."""
        return len(self.retained.kept[index]) < self.retained.num_experts

    def own(self, decoder: Decoder, index: int) -> torch.Tensor | None:
        """A layer's own `down_proj`, None where it is the model's."""
        tensor = self.down_proj.get(f"{decoder.layer_name(index)}.experts.down_proj")
        return None if tensor is None else read_rows(tensor).to(device=decoder.device, dtype=decoder.dtype)


@contextmanager
def pruned(layer: Any, kept: Sequence[int], down_proj: torch.Tensor | None) -> Iterator[None]:
    """Within, a layer computes what the pruned one would."""
    before = layer.experts.down_proj.data
    layer.experts.down_proj.data = before if down_proj is None else down_proj
    try:
        with only(layer, kept):
            yield
    finally:
        layer.experts.down_proj.data = before


@contextmanager
def only(layer: Any, kept: Sequence[int]) -> Iterator[None]:
    """Within, the router of a transformers decoder layer chooses among these experts."""
    dropped = torch.ones(layer.router.proj.out_features, dtype=torch.bool)
    dropped[list(kept)] = False

    def mask(module: torch.nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(dropped.to(logits.device), float("-inf"))

    handle = layer.router.proj.register_forward_hook(mask)
    try:
        yield
    finally:
        handle.remove()


class Streams:
    """Activations of all variants, between two layers.

    Args:
        decoder: the model.
        samples: token ids.
        n_variants: how many there are. Only the first one's embeddings are there at the start: the others begin as its
            copies, where they first differ.
        limit: bytes of activations to keep in memory, all variants together.
    """

    def __init__(self, decoder: Decoder, samples: Sequence[Sequence[int]], n_variants: int, limit: int):
        self._decoder, self._samples = decoder, samples
        layout = layout_of(decoder, samples)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if layout.n_bytes * n_variants > limit:
            self._folder = tempfile.TemporaryDirectory(prefix="gemma4q-")
        self._hidden = [self._new(number) for number in range(n_variants)]

    def __enter__(self) -> "Streams":
        for number, ids in enumerate(self._samples):
            self._hidden[0].put(number, self._decoder.embed(ids))
        return self

    def __exit__(self, *error: object) -> None:
        self._hidden.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def get(self, variant: int, sample: int) -> torch.Tensor:
        """[tokens, hidden], on the decoder's device."""
        return self._hidden[variant].get(sample).to(self._decoder.device)

    def put(self, variant: int, sample: int, values: torch.Tensor) -> None:
        """What enters the next layer."""
        self._hidden[variant].put(sample, values)

    def _new(self, number: int) -> Hidden:
        layout = layout_of(self._decoder, self._samples)
        if self._folder is None:
            return Activations(layout)
        return StoredActivations(Path(self._folder.name) / f"variant-{number}.bin", layout, new=True)
