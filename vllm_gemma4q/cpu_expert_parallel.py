"""Unquantized experts on CPUs under expert parallelism, where vLLM 0.32 dies of a segmentation fault.

Its kernel for CPUs takes ids of experts for places in the weights that the rank has, and knows nothing of
`expert_map`. Here it is given places: those of other ranks' experts are replaced by the first, with a weight of zero.
"""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.platforms import current_platform


def give_places_to_kernels(layers: Iterable[Any]) -> None:
    """Change the method of a model's MoE layers (vLLM's `MoERunner`) before their weights are loaded, where needed."""
    for layer in layers:
        experts = layer.routed_experts
        is_vllms = type(experts.quant_method) is UnquantizedFusedMoEMethod
        if current_platform.is_cpu() and is_vllms and experts.expert_map is not None:
            layer._replace_quant_method(LocalUnquantizedMoEMethod(experts.moe_config))


class LocalUnquantizedMoEMethod(UnquantizedFusedMoEMethod):
    """vLLM's method, called with this rank's experts only."""

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """This rank's share of the experts' output, [T, H]; vLLM sums over ranks."""
        weights, places = local_routing(topk_weights, topk_ids, layer.expert_map)
        output: torch.Tensor = super().apply(layer, x, weights, places, shared_experts, shared_experts_input)
        return output


def local_routing(
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What one rank computes of a routing.

    Args:
        topk_weights: float [T, k].
        topk_ids: int [T, k], global expert ids.
        expert_map: int [E], an expert's place on this rank, -1 where it is on another.

    Returns:
        The weights, zero for experts of other ranks, and the places, int32; both contiguous.
    """
    places = expert_map[topk_ids.long()].to(torch.int32)
    return topk_weights.masked_fill(places < 0, 0), places.clamp_min(0)
