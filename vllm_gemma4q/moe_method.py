"""Experts that `gemma4q_kernels` multiplies: what our methods of all schemes share.

Expert parallelism is honoured through `expert_map`. Not done: LoRA on experts, EPLB.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from gemma4q_kernels.grouped_mm import ACTIVATIONS
from vllm.model_executor.layers.fused_moe import FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs


class LoadedMoEMethod(FusedMoEMethodBase):
    """One layer's experts, which become one object when they are loaded, and one operation when they are applied.

    Args:
        scheme: of the experts, as errors name it.

    Raises:
        NotImplementedError: these experts cannot serve the configuration.
    """

    def __init__(self, moe: FusedMoEConfig, scheme: str) -> None:
        super().__init__(moe)
        if reason := refusal(moe):
            raise NotImplementedError(f"{scheme}: {reason}")
        self.experts: Callable[..., torch.Tensor] | None = None
        self.expert_map: torch.Tensor | None = None

    def loaded(self, layer: RoutedExperts, experts: Callable[..., torch.Tensor]) -> None:
        """Say what a layer's weights have become: called with x, topk_weights, topk_ids, activation and expert_map."""
        self.experts, self.expert_map = experts, layer.expert_map
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
        output: torch.Tensor = loaded_experts(x, topk_weights, topk_ids, layer.activation.value, layer.layer_name)
        return output

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        return None


# Layer names are unique among the models that run in one process (vLLM's forward context relies on it too).
_LOADED: WeakValueDictionary[str, LoadedMoEMethod] = WeakValueDictionary()


@torch.library.custom_op("gemma4q::experts", mutates_args=())
def loaded_experts(
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


@loaded_experts.register_fake
def _loaded_experts_shape(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, activation: str, layer_name: str
) -> torch.Tensor:
    return torch.empty_like(x)


class OwnMoEMethod(LoadedMoEMethod):
    """Experts with a weight and scales each, loaded and sharded by vLLM's `RoutedExperts`.

    Parameters (E local experts, I per tensor-parallel rank):
        w13_weight [E, 2I, H], rows: gate, then up     w2_weight [E, H, I]     and the scheme's scales

    Args:
        dtype: of their weights.
    """

    def __init__(self, moe: FusedMoEConfig, scheme: str, dtype: torch.dtype) -> None:
        super().__init__(moe, scheme)
        self.weight_dtype = dtype

    @abstractmethod
    def scales(self, name: str, num_experts: int, rows: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the scales of `w13` or `w2`, whose weights have so many rows, by their parameters' names."""

    @property
    @abstractmethod
    def granularity(self) -> FusedMoeWeightScaleSupported:
        """What one weight scale is for: tells vLLM how to cut and place it."""

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
        scale_attributes = {**extra_weight_attrs, "quant_method": self.granularity.value}
        for name in ("w13", "w2"):
            weight = torch.empty(num_experts, rows[name], columns[name], dtype=self.weight_dtype)
            _register(layer, f"{name}_weight", weight, extra_weight_attrs)
            for scale, shape in self.scales(name, num_experts, rows[name]).items():
                # NaN until loaded: a scale that nobody wrote must not pass for one.
                _register(layer, scale, torch.full(shape, torch.nan, dtype=torch.float32), scale_attributes)


def refusal(moe: FusedMoEConfig) -> str | None:
    """Why our experts cannot serve a configuration, None where they can."""
    if moe.activation.value not in ACTIVATIONS:
        return f"activation is {moe.activation.value}, expected one of {', '.join(ACTIVATIONS)}"
    if moe.has_bias:
        return "experts have biases, expected none"
    if moe.is_lora_enabled:
        return "LoRA is enabled, expected off: the plugin's own experts have none"
    return None


def _register(layer: torch.nn.Module, name: str, data: torch.Tensor, attributes: dict[str, Any]) -> None:
    parameter = torch.nn.Parameter(data, requires_grad=False)
    layer.register_parameter(name, parameter)
    set_weight_attrs(parameter, attributes)
