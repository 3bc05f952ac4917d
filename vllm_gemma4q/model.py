"""vLLM's Gemma 4 with three additions: a quantization config may mend tensors while they stream in, layers may have
different numbers of experts, and CPUs serve unquantized experts in parallel.

One class for all, since vLLM knows one class an architecture: the active config says what is to be mended, by its
`weight_mender`; the model's configuration says how many experts. In all other cases this is the upstream class.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models import gemma4

from vllm_gemma4q.cpu_expert_parallel import give_places_to_kernels
from vllm_gemma4q.pruned_moe.model import own_experts_in_each_layer
from vllm_gemma4q.quark_int8.lm_head import refuse_reload

Weights = Iterable[tuple[str, torch.Tensor]]
Mender = Callable[[Weights], Iterator[tuple[str, torch.Tensor]]]


@runtime_checkable
class MendingConfig(Protocol):
    """A quantization config whose checkpoints are laid out otherwise than vLLM loads them."""

    def weight_mender(self) -> Mender | None:
        """A new mender for one model, called once per run of names; None where nothing has to be mended."""
        ...


class Gemma4ForCausalLM(gemma4.Gemma4ForCausalLM):
    """Upstream's class, under its own name; `load_weights` streams through the config's mender."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with own_experts_in_each_layer(vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        give_places_to_kernels(self.moe_layers)
        # Kept, because it may hold halves: the multimodal wrapper calls `load_weights` once per run of names.
        self._mend = self.quant_config.weight_mender() if isinstance(self.quant_config, MendingConfig) else None

    def load_weights(self, weights: Weights) -> set[str]:
        refuse_reload(self.lm_head)
        loaded: set[str] = super().load_weights(weights if self._mend is None else self._mend(weights))
        return loaded
