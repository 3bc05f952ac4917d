"""Which checkpoints can be pruned at all: mixtures of experts with as many in every layer."""

from collections.abc import Mapping
from typing import Any

from vllm_gemma4q.architecture import TextArchitecture, parse_text_architecture
from vllm_gemma4q.errors import InputError


def mixture_of(config: Mapping[str, Any]) -> tuple[TextArchitecture, int, int]:
    """The architecture that a config.json describes, experts of each layer, and experts a token.

    Raises:
        InputError: no Gemma 4, a dense one, or one pruned to differing numbers of experts.
    """
    architecture = parse_text_architecture(config)
    if architecture.num_experts is None or architecture.top_k_experts is None:
        raise InputError("config.json: got a dense model, expected one with experts (enable_moe_block, num_experts)")
    if any(layer.num_experts != architecture.num_experts for layer in architecture.layers):
        raise InputError(
            "config.json: got layers with different numbers of experts (num_experts_per_layer), "
            "expected a checkpoint that was not pruned: prune the one it was made from"
        )
    return architecture, architecture.num_experts, architecture.top_k_experts
