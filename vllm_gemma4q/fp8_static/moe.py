"""Experts in FP8 with static scales: vLLM's kernels on GPUs that have them, ours elsewhere.

vLLM's kernels take one weight scale for an expert's gate and up together, and stock vLLM rounds both again to the
larger of theirs. Here no weight is rounded twice: `up` is linear in what follows, so its scale moves into that of
`down`, and what is between them is quantized with an input scale that moved the other way (see `fold_up_scale`).

Parameters of ours beside those of `moe_method`, float32: w13_weight_scale [E, 2] or [E, 2I], w2_weight_scale [E] or
[E, H], w13_input_scale and w2_input_scale [E].
Not done: one weight scale a row on GPUs (vLLM has no kernel with static inputs).
"""

from functools import partial
from typing import Any

import torch
from gemma4q_kernels import fp8_scaled_mm
from vllm.model_executor.layers.fused_moe import FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod
from vllm.model_executor.layers.quantization.utils.fp8_utils import process_fp8_input_tensor_strategy_moe
from vllm.model_executor.layers.quantization.utils.w8a8_utils import normalize_e4m3fn_to_e4m3fnuz
from vllm.model_executor.utils import replace_parameter, set_weight_attrs
from vllm.platforms import current_platform

from vllm_gemma4q.compat import weights_are_prepared
from vllm_gemma4q.fp8_static.linear import DUMMY_SCALE, check_scales, engine_has_kernels
from vllm_gemma4q.moe_method import OwnMoEMethod

_SCALES = ("w13_weight_scale", "w2_weight_scale", "w13_input_scale", "w2_input_scale")


def fp8_experts_method(layer: RoutedExperts, by_channel: bool) -> FusedMoEMethodBase:
    """The method for one layer's experts.

    Args:
        by_channel: each row of a weight has its own scale.

    Raises:
        NotImplementedError: no method serves this configuration on this platform.
    """
    moe = layer.moe_config
    if not engine_has_kernels() and moe.moe_backend == "auto":
        return DecodedFp8MoEMethod(moe, by_channel)
    if by_channel:
        raise NotImplementedError(
            "FP8 experts: got one weight scale a row with static inputs, expected one a weight: "
            "vLLM has no kernel for them on this platform"
        )
    return FoldedFp8MoEMethod(Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="static"), layer)


def fold_up_scale(
    w13_scale: torch.Tensor, w2_scale: torch.Tensor, w2_input_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales under which gate and up share one, and the experts compute the same function.

    With gate's scale g taken for up's u, up and its product with the activation come out g/u times as large. So `down`
    is scaled by u/g, and its input scale by g/u.

    Args:
        w13_scale: [E, 2], gate's and up's.
        w2_scale, w2_input_scale: [E].

    Returns:
        The same three, both columns of the first being gate's.
    """
    gate, up = w13_scale.unbind(dim=1)
    return gate.unsqueeze(1).expand(-1, 2).contiguous(), w2_scale * up / gate, w2_input_scale * gate / up


class FoldedFp8MoEMethod(Fp8MoEMethod):
    """vLLM's method, without its second rounding of gate and up; with it where LoRA is enabled.

    Adapters of experts add to what is between the two multiplications, and read it, at its true scale.
    """

    def create_weights(self, layer: RoutedExperts, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        for name in _SCALES:
            set_weight_attrs(getattr(layer, name), DUMMY_SCALE)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        if weights_are_prepared():  # already folded by another process: only the kernel is missing
            super().process_weights_after_loading(layer)
            return
        for name in _SCALES:
            check_scales(layer.layer_name, name, getattr(layer, name))
        if layer.moe_config.is_lora_enabled:
            super().process_weights_after_loading(layer)
            return
        w13, w2 = layer.w13_weight.data, layer.w2_weight.data
        w13_input = layer.w13_input_scale.data
        w13_scale, w2_scale, w2_input = fold_up_scale(
            layer.w13_weight_scale.data, layer.w2_weight_scale.data, layer.w2_input_scale.data
        )
        if current_platform.is_fp8_fnuz():
            w13, w13_scale, w13_input = normalize_e4m3fn_to_e4m3fnuz(w13, w13_scale, w13_input)
            w2, w2_scale, w2_input = normalize_e4m3fn_to_e4m3fnuz(w2, w2_scale, w2_input)
        eplb = layer.moe_config.moe_parallel_config.enable_eplb
        w13_input, w2_input = process_fp8_input_tensor_strategy_moe(w13_input, w2_input, eplb)
        replace_parameter(layer, "w13_input_scale", w13_input)
        replace_parameter(layer, "w2_input_scale", w2_input)
        self._setup_kernel(layer, w13, w2, w13_scale[:, 0].contiguous(), w2_scale, w13_input, w2_input)


class DecodedFp8MoEMethod(OwnMoEMethod):
    """W8A8 FP8 experts without FP8 instructions, two multiplications for each active expert."""

    def __init__(self, moe: FusedMoEConfig, by_channel: bool) -> None:
        super().__init__(moe, "FP8 experts without FP8 kernels", fp8_scaled_mm.E4M3)
        self.by_channel = by_channel

    def create_weights(self, layer: RoutedExperts, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        for name in _SCALES:
            set_weight_attrs(getattr(layer, name), DUMMY_SCALE)

    def scales(self, name: str, num_experts: int, rows: int) -> dict[str, tuple[int, ...]]:
        whole = (num_experts, 2) if name == "w13" else (num_experts,)
        return {
            f"{name}_weight_scale": (num_experts, rows) if self.by_channel else whole,
            f"{name}_input_scale": (num_experts,),
        }

    @property
    def granularity(self) -> FusedMoeWeightScaleSupported:
        return FusedMoeWeightScaleSupported.CHANNEL if self.by_channel else FusedMoeWeightScaleSupported.TENSOR

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        for name in _SCALES:
            check_scales(layer.layer_name, name, getattr(layer, name))
        experts = layer.w13_weight.shape[0]
        for name in ("w13", "w2"):
            rows = getattr(layer, f"{name}_weight").shape[1]
            scale = getattr(layer, f"{name}_weight_scale").data.reshape(experts, -1)
            replace_parameter(layer, f"{name}_weight_scale", scale.repeat_interleave(rows // scale.shape[1], dim=1))
            # One for all experts, as vLLM's kernels have it.
            replace_parameter(layer, f"{name}_input_scale", getattr(layer, f"{name}_input_scale").data.max())
        self.loaded(layer, partial(_decoded_experts, layer))


def _decoded_experts(layer: RoutedExperts, x: torch.Tensor, *routing: Any) -> torch.Tensor:
    first, second = (layer.w13_weight, layer.w13_weight_scale), (layer.w2_weight, layer.w2_weight_scale)
    return fp8_scaled_mm.moe_fp8(x, *first, *second, layer.w13_input_scale, layer.w2_input_scale, *routing)
