"""Several variants of one model side by side, one decoder layer in memory at a time.

Variants differ in which experts the router may choose: a dropped expert's logit is set to -inf, which gives what
slicing gives, exactly. They may also have the knobs of `knobs.Options`, and a `down_proj` of their own (see `refit`).
Each layer is loaded once and runs all samples of all variants before the next is loaded.
Activations lie in memory up to a limit, else in a temporary folder. Not resumable: a run is a few forward passes.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gguf_mixed.drop_map import RetainedExperts
from gguf_mixed.temporary import temporary_folder
from vllm_gemma4q.calibration.activations import Activations, StoredActivations
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.forward import layout_of
from vllm_gemma4q.calibration.weights import read_rows
from vllm_gemma4q.checkpoint import TensorInfo
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.pruned_moe.knobs import Options, boosted, transferred

Progress = Callable[[int], object]
Hidden = Activations | StoredActivations


@dataclass(frozen=True)
class Variant:
    """One way to prune a model.

    Attributes:
        retained: experts that stay.
        down_proj: tensors by name, [E, hidden, width], that take the place of the model's, where there are some.
        options: what else the prune changes.
    """

    retained: RetainedExperts
    down_proj: Mapping[str, TensorInfo] = field(default_factory=dict)
    options: Options = field(default_factory=Options)

    def drops(self, index: int) -> bool:
        """Whether a layer loses experts."""
        return len(self.retained.kept[index]) < self.retained.num_experts

    def changes(self, index: int) -> bool:
        """Whether a layer differs from the unpruned model's."""
        return self.drops(index) or self.options.shared_boost != 1 or self.options.top_k is not None

    def applied(self, layer: Any, index: int, down_proj: torch.Tensor | None = None) -> AbstractContextManager[None]:
        """Within, a loaded layer is this variant's; `down_proj` as `own` gives it."""
        return pruned(layer, self.retained.kept[index], self.options, down_proj)

    def own(self, decoder: Decoder, index: int) -> torch.Tensor | None:
        """A layer's own `down_proj`, None where it is the model's."""
        tensor = self.down_proj.get(f"{decoder.layer_name(index)}.experts.down_proj")
        return None if tensor is None else read_rows(tensor).to(device=decoder.device, dtype=decoder.dtype)


@contextmanager
def pruned(layer: Any, kept: Sequence[int], options: Options, down_proj: torch.Tensor | None = None) -> Iterator[None]:
    """Within, a transformers decoder layer computes what the pruned one would.

    Args:
        kept: experts that its router chooses among.
        down_proj: of all experts, in place of the layer's, where given.
    """
    norm, router = layer.post_feedforward_layernorm_1.weight, layer.router.proj
    dropped = torch.ones(router.out_features, dtype=torch.bool)
    dropped[list(kept)] = False
    experts = layer.experts.down_proj
    before = [(part, part.data) for part in (experts, norm, router.weight)]
    top_k = layer.config.top_k_experts

    def mask(module: torch.nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(dropped.to(logits.device), float("-inf"))

    handle = router.register_forward_hook(mask)
    try:
        if down_proj is not None:
            experts.data = down_proj
        if options.shared_boost != 1:
            norm.data = boosted(norm.data, options.shared_boost)
        if options.soft_transfer and bool(dropped.any()):
            router.weight.data = _with_rows(router.weight.data, kept, options.soft_transfer)
        layer.config.top_k_experts = options.top_k or top_k
        yield
    finally:
        handle.remove()
        layer.config.top_k_experts = top_k
        for part, values in before:
            part.data = values


def _with_rows(router: torch.Tensor, kept: Sequence[int], share: float) -> torch.Tensor:
    rows = router.clone()
    rows[list(kept)] = transferred(router, kept, share)
    return rows


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder.parent}: activations take {needed:,} bytes, and {free:,} are free: "
            "fewer --samples, a larger --activations-limit, or another TMPDIR"
        )


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
        self._hidden: list[Hidden]
        if layout.n_bytes * n_variants <= limit:
            self._hidden = [Activations(layout) for _ in range(n_variants)]
            return
        # Open files without a name: a killed process leaves none behind.
        with temporary_folder() as folder:
            _check_room(folder, layout.n_bytes * n_variants)
            paths = (folder / f"variant-{number}.bin" for number in range(n_variants))
            self._hidden = [StoredActivations(path, layout, new=True) for path in paths]

    def __enter__(self) -> "Streams":
        for number, ids in enumerate(self._samples):
            self._hidden[0].put(number, self._decoder.embed(ids))
        return self

    def __exit__(self, *error: object) -> None:
        self._hidden.clear()

    def get(self, variant: int, sample: int) -> torch.Tensor:
        """[tokens, hidden], on the decoder's device."""
        return self._hidden[variant].get(sample).to(self._decoder.device)

    def put(self, variant: int, sample: int, values: torch.Tensor) -> None:
        """What enters the next layer."""
        self._hidden[variant].put(sample, values)
