"""vLLM's method for experts in EXL3, packed in memory: a few multiplications for each expert that got tokens.

Bits may differ from expert to expert and from projection to projection. Parameters, each flat, with this rank's experts
behind each other (`shards.py`): w13_{trellis, suh, svh} of gate and up, w2_{..} of down. Computed in `experts.py`.

Not done: one launch for all experts; LoRA, EPLB.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from gemma4q_kernels.exl3_layout import Span
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from vllm_gemma4q.exl3.experts import Expert, Experts
from vllm_gemma4q.exl3.facts import INPUT_SIGNS, OUTPUT_SIGNS, TRELLIS, Packed
from vllm_gemma4q.exl3.shards import Layout, Part, expert_share
from vllm_gemma4q.moe_method import LoadedMoEMethod


class Exl3MoEMethod(LoadedMoEMethod):
    """One layer's experts.

    Args:
        linears: how each expert's are stored, by `3.up_proj` and so on.

    Raises:
        NotImplementedError: these experts cannot serve the configuration.
    """

    def __init__(self, moe: FusedMoEConfig, linears: Mapping[str, Packed]) -> None:
        super().__init__(moe, "EXL3 experts")
        self.linears = linears

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        parallel, whole = self.moe.moe_parallel_config, self.linears["0.up_proj"]
        self.hidden = Span(0, whole.in_features)
        self.inner = expert_share(
            layer.layer_name,
            whole.out_features,
            intermediate_size_per_partition,
            parallel.tp_rank,
            parallel.tp_size,
        )
        places = [layer._map_global_expert_id_to_local_expert_id(expert) for expert in range(layer.global_num_experts)]
        experts = [expert for _, expert in sorted((place, expert) for expert, place in enumerate(places) if place >= 0)]
        first = [f"{expert}.{name}" for expert in experts for name in ("gate_proj", "up_proj")]
        second = [f"{expert}.down_proj" for expert in experts]
        self.first = self._register(layer, "w13_", first, self.hidden, self.inner)
        self.second = self._register(layer, "w2_", second, self.inner, self.hidden)

    def _register(self, layer: RoutedExperts, prefix: str, names: list[str], inputs: Span, outputs: Span) -> Layout:
        layout = Layout(tuple(Part(self.linears[name], inputs, outputs) for name in names))
        layout.register(layer, prefix, _loader(layer, layout))
        return layout

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        both, down = (
            layout.weights(*(getattr(layer, prefix + leaf) for leaf in (TRELLIS, INPUT_SIGNS, OUTPUT_SIGNS)))
            for prefix, layout in (("w13_", self.first), ("w2_", self.second))
        )
        experts = [Expert(*one) for one in zip(both[::2], both[1::2], down, strict=True)]
        self.loaded(layer, Experts(experts, self.hidden, self.inner))


def _loader(layer: RoutedExperts, layout: Layout) -> Callable[..., bool | None]:
    """Puts one expert's tensor where it belongs, where this rank has the expert."""

    def load(
        leaf: str,
        param: torch.Tensor,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        place = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if place >= 0:
            index = place if shard_id == "w2" else 2 * place + (shard_id == "w3")
            if leaf == TRELLIS:  # two-dimensional from `mend.py`
                loaded_weight = loaded_weight.reshape(len(loaded_weight), -1, layout.parts[index].packed.width)
            layout.load(leaf, param, loaded_weight, index)
        return place >= 0 if return_success else None

    return load
