"""Experts: vLLM's INT8 method where it has one for Gemma 4, ours on a CPU.

vLLM 0.32's only INT8 experts for CPUs know SiLU; Gemma 4 is gated by GELU (tanh). A backend that the user asked
for (`--moe-backend`) is always vLLM's to grant or refuse.

Parameters of ours, loaded and sharded by vLLM's `RoutedExperts` (E local experts, I per tensor-parallel rank):
    w13_weight [E, 2I, H] int8, rows: gate, then up     w13_weight_scale [E, 2I] float32
    w2_weight  [E, H, I]  int8                          w2_weight_scale  [E, H]  float32
Expert parallelism is honoured through `expert_map`. Not done: LoRA on experts, EPLB.
"""

from typing import Any
from weakref import WeakValueDictionary

import torch
from gemma4q_kernels.grouped_mm import ACTIVATIONS, Experts
from vllm.model_executor.layers.fused_moe import FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.quark.quark_moe import QuarkW8A8Int8MoEMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import kInt8DynamicTokenSym, kInt8StaticChannelSym
from vllm.model_executor.utils import replace_parameter, set_weight_attrs
from vllm.platforms import current_platform


def int8_experts_method(layer: RoutedExperts) -> FusedMoEMethodBase:
    """The method for one layer's experts.

    Raises:
        NotImplementedError: no method serves this configuration on this platform.
    """
    moe = layer.moe_config
    if current_platform.is_cpu() and moe.moe_backend == "auto":
        return CpuInt8MoEMethod(moe)
    return QuarkW8A8Int8MoEMethod(moe, kInt8StaticChannelSym, kInt8DynamicTokenSym)


def _refusal(moe: FusedMoEConfig) -> str | None:
    """Why our CPU experts cannot serve a configuration, None where they can."""
    if moe.activation.value not in ACTIVATIONS:
        return f"activation is {moe.activation.value}, expected one of {', '.join(ACTIVATIONS)}"
    if moe.has_bias:
        return "experts have biases, expected none"
    if moe.is_lora_enabled:
        return "LoRA is enabled, expected off for int8 experts on a CPU"
    return None


class CpuInt8MoEMethod(FusedMoEMethodBase):
    """W8A8 experts on a CPU, one pair of integer multiplications for each active expert."""

    def __init__(self, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        if reason := _refusal(moe):
            raise NotImplementedError(f"int8 experts on a CPU: {reason}")
        self.experts: Experts | None = None
        self.expert_map: torch.Tensor | None = None

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        rows = {"w13": 2 * intermediate_size_per_partition, "w2": hidden_size}
        columns = {"w13": hidden_size, "w2": intermediate_size_per_partition}
        scale_attrs = {**extra_weight_attrs, "quant_method": FusedMoeWeightScaleSupported.CHANNEL.value}
        for name in ("w13", "w2"):
            weight = torch.empty(num_experts, rows[name], columns[name], dtype=torch.int8)
            # NaN until loaded: a scale that nobody wrote must not pass for one.
            scale = torch.full((num_experts, rows[name]), torch.nan, dtype=torch.float32)
            _register(layer, f"{name}_weight", weight, extra_weight_attrs)
            _register(layer, f"{name}_weight_scale", scale, scale_attrs)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        tensors = (layer.w13_weight, layer.w13_weight_scale, layer.w2_weight, layer.w2_weight_scale)
        self.experts = Experts(*(tensor.data for tensor in tensors))
        # `Experts` holds its own copy, reordered for the processor.
        for name in ("w13_weight", "w2_weight"):
            replace_parameter(layer, name, torch.empty(0, dtype=torch.int8))
        self.expert_map = layer.expert_map
        _LOADED[layer.layer_name] = self

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        return None

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


def _register(layer: torch.nn.Module, name: str, data: torch.Tensor, attributes: dict[str, Any]) -> None:
    parameter = torch.nn.Parameter(data, requires_grad=False)
    layer.register_parameter(name, parameter)
    set_weight_attrs(parameter, attributes)
