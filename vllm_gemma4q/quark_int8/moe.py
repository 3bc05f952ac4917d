"""Experts: vLLM's INT8 method where it has one for Gemma 4 (its kernels or ours: `kernels.py`), ours on a CPU.

vLLM 0.32's only INT8 experts for CPUs know SiLU; Gemma 4 is gated by GELU (tanh). A backend that the user asked
for (`--moe-backend`) is always vLLM's to grant or refuse.

Parameters of ours beside those of `moe_method`: w13_weight_scale [E, 2I], w2_weight_scale [E, H], float32.
"""

import torch
from gemma4q_kernels.grouped_mm import Experts
from vllm.model_executor.layers.fused_moe import FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from vllm_gemma4q.compat import quark_experts_method
from vllm_gemma4q.moe_method import OwnMoEMethod
from vllm_gemma4q.quark_int8 import kernels


def int8_experts_method(layer: RoutedExperts) -> FusedMoEMethodBase:
    """The method for one layer's experts.

    Raises:
        NotImplementedError: no method serves this configuration on this platform.
    """
    kernels.register()
    moe = layer.moe_config
    if current_platform.is_cpu() and moe.moe_backend == "auto":
        return CpuInt8MoEMethod(moe)
    method: FusedMoEMethodBase = quark_experts_method(moe)
    return method


class CpuInt8MoEMethod(OwnMoEMethod):
    """W8A8 experts on a CPU, one pair of integer multiplications for each active expert."""

    def __init__(self, moe: FusedMoEConfig) -> None:
        super().__init__(moe, "int8 experts on a CPU", torch.int8)

    def scales(self, name: str, num_experts: int, rows: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}_weight_scale": (num_experts, rows)}

    @property
    def granularity(self) -> FusedMoeWeightScaleSupported:
        return FusedMoeWeightScaleSupported.CHANNEL

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        tensors = (layer.w13_weight, layer.w13_weight_scale, layer.w2_weight, layer.w2_weight_scale)
        self.loaded(layer, Experts(*(tensor.data for tensor in tensors)))
        # `Experts` holds its own copy, reordered for the processor.
        for name in ("w13_weight", "w2_weight"):
            replace_parameter(layer, name, torch.empty(0, dtype=torch.int8))
