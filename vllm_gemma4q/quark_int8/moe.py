"""Experts: vLLM's INT8 method where it has one for Gemma 4 (its kernels or ours: `kernels.py`), ours on a CPU.

vLLM 0.32's only INT8 experts for CPUs know SiLU; Gemma 4 is gated by GELU (tanh). A backend that the user asked
for (`--moe-backend`) is always vLLM's to grant or refuse.

Parameters of ours beside those of `moe_method`: w13_weight_scale [E, 2I], w2_weight_scale [E, H], float32.
"""

from weakref import WeakValueDictionary

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
        self.experts: Experts | None = None
        self.expert_map: torch.Tensor | None = None

    def scales(self, name: str, num_experts: int, rows: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}_weight_scale": (num_experts, rows)}

    @property
    def granularity(self) -> FusedMoeWeightScaleSupported:
        return FusedMoeWeightScaleSupported.CHANNEL

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        tensors = (layer.w13_weight, layer.w13_weight_scale, layer.w2_weight, layer.w2_weight_scale)
        self.experts = Experts(*(tensor.data for tensor in tensors))
        # `Experts` holds its own copy, reordered for the processor.
        for name in ("w13_weight", "w2_weight"):
            replace_parameter(layer, name, torch.empty(0, dtype=torch.int8))
        self.expert_map = layer.expert_map
        _LOADED[layer.layer_name] = self

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: object | None,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """This rank's share of the experts' output, [T, H]; vLLM sums over ranks."""
        output: torch.Tensor = int8_experts(x, topk_weights, topk_ids, layer.activation.value, layer.layer_name)
        return output


# Layer names are unique among the models that run in one process (vLLM's forward context relies on it too).
_LOADED: WeakValueDictionary[str, CpuInt8MoEMethod] = WeakValueDictionary()


@torch.library.custom_op("gemma4q::int8_experts", mutates_args=())
def int8_experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, activation: str, layer_name: str
) -> torch.Tensor:
    """A layer's loaded experts as one opaque operation: torch.compile cannot trace which experts are active.

    Args:
        x: [T, H].
        topk_weights: float [T, k].
        topk_ids: int [T, k], global expert ids.
        activation: one of `gemma4q_kernels.grouped_mm.ACTIVATIONS`.
        layer_name: the engine's name of the layer.
    """
    method = _LOADED[layer_name]
    if method.experts is None:
        raise RuntimeError(f"{layer_name}: weights are not loaded")
    return method.experts(x, topk_weights, topk_ids, activation, method.expert_map)


@int8_experts.register_fake
def _int8_experts_shape(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, activation: str, layer_name: str
) -> torch.Tensor:
    return torch.empty_like(x)
