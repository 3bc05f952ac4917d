"""vLLM's descriptions of layers that our INT8 kernels for GPUs are asked about."""

from typing import Any

import torch

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 6, 3, 80, 48


def linear_config() -> Any:
    """A linear as Quark's scheme describes Gemma 4's."""
    from vllm.model_executor.kernels.linear import Int8ScaledMMLinearLayerConfig

    return Int8ScaledMMLinearLayerConfig(is_static_input_scheme=False, is_channelwise=True, input_symmetric=True)


def experts_config(**change: Any) -> Any:
    """Experts of one rank, gated by GELU (tanh), in float32."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    fields = {
        "num_experts": EXPERTS,
        "experts_per_token": TOP_K,
        "hidden_dim": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_local_experts": EXPERTS,
        "num_logical_experts": EXPERTS,
        "activation": MoEActivation.GELU_TANH,
        "device": "cpu",
        "routing_method": RoutingMethodType.Renormalize,
        "moe_parallel_config": FusedMoEParallelConfig.make_no_parallel(),
        "in_dtype": torch.float32,
    }
    return FusedMoEConfig(**{**fields, **change})


def activation_format(name: str = "Standard") -> Any:
    """How tokens reach the experts: "Standard" or "BatchedExperts"."""
    from vllm.model_executor.layers.fused_moe import modular_kernel

    return modular_kernel.FusedMoEActivationFormat[name]
