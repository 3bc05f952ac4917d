"""Linears in FP8 with static scales: vLLM's own kernels on GPUs that have them, ours elsewhere.

Weight scales are per output channel always, so that the shards of a fused linear keep their own. Input scales of the
shards of a fused linear, which share one input, are replaced by their largest, as vLLM does.

    CUDA                        compressed-tensors' W8A8 scheme: CUTLASS or torch kernels; Marlin before sm_89
    ROCm with FP8 (MI300 ..)    the same scheme
    CPU, ROCm without (gfx1100) `gemma4q_kernels.fp8_scaled_mm`: the same codes, multiplied without FP8 instructions

Not done here: XPU kernels (ours run there), LoRA.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from gemma4q_kernels import fp8_scaled_mm
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
    CompressedTensorsW8A8Fp8,
)
from vllm.model_executor.layers.quantization.utils.fp8_utils import (
    create_fp8_input_scale,
    create_fp8_scale_parameter,
    create_fp8_weight_parameter,
)
from vllm.model_executor.parameter import ChannelQuantScaleParameter
from vllm.model_executor.utils import replace_parameter, set_weight_attrs
from vllm.platforms import current_platform

from vllm_gemma4q.errors import InputError

if TYPE_CHECKING:
    from vllm_gemma4q.fp8_static.config import Fp8StaticConfig

# What `--load-format dummy` gives scales: else small numbers of either sign (vLLM 0.32; older ones know no such wish).
DUMMY_SCALE = {"dummy_weight_value": 1.0}


def engine_has_kernels() -> bool:
    """Whether vLLM multiplies FP8 on this platform by itself."""
    return bool(current_platform.is_cuda() or (current_platform.is_rocm() and current_platform.supports_fp8()))


def fp8_linear_method(config: "Fp8StaticConfig", layer: torch.nn.Module, prefix: str) -> CompressedTensorsLinearMethod:
    """The method for one linear; attaches the scheme to the layer, where the method looks for it."""
    if engine_has_kernels():
        weights = QuantizationArgs(num_bits=8, type="float", strategy=QuantizationStrategy.CHANNEL)
        layer.scheme = CompressedTensorsW8A8Fp8(weights, is_static_input_scheme=True)
    else:
        layer.scheme = DecodedFp8(prefix)
    return CompressedTensorsLinearMethod(config)


class DecodedFp8(CompressedTensorsScheme):
    """W8A8 FP8 without FP8 instructions.

    Parameters: weight E4M3 [N, K]; weight_scale float32 [N, 1] while loading, then [N]; input_scale float32, one a
    shard while loading, then one.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        weight_loader: Callable[..., Any],
        **kwargs: Any,
    ) -> None:
        rows = sum(output_partition_sizes)
        weight = create_fp8_weight_parameter(rows, input_size_per_partition, weight_loader)
        weight_scale = create_fp8_scale_parameter(
            ChannelQuantScaleParameter, output_partition_sizes, input_size_per_partition, None, weight_loader
        )
        layer.register_parameter("weight", weight)
        layer.register_parameter("weight_scale", weight_scale)
        layer.register_parameter("input_scale", create_fp8_input_scale(output_partition_sizes, weight_loader))
        for scale in (layer.weight_scale, layer.input_scale):
            set_weight_attrs(scale, DUMMY_SCALE)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight, weight_scale, input_scale = (
            layer.get_parameter(name).data for name in ("weight", "weight_scale", "input_scale")
        )
        check_scales(self.prefix, "weight_scale", weight_scale)
        check_scales(self.prefix, "input_scale", input_scale.max())
        replace_parameter(layer, "weight", weight)
        replace_parameter(layer, "weight_scale", weight_scale.reshape(-1))
        replace_parameter(layer, "input_scale", input_scale.max())

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = fp8_static_linear(x, layer.weight, layer.weight_scale, layer.input_scale, bias)
        return out


def check_scales(module: str, name: str, scales: torch.Tensor) -> None:
    """Raises InputError unless all scales are positive and finite: others would turn answers into NaN or zeros."""
    bad = ~((scales > 0) & scales.isfinite())
    if bool(bad.any()):
        value = float(scales[bad].flatten()[0]) if scales.dim() else float(scales)
        raise InputError(f"tensor {module}.{name}: got {value:g}, expected a positive number")


@torch.library.custom_op("gemma4q::fp8_static_linear", mutates_args=())
def fp8_static_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`gemma4q_kernels.fp8_scaled_mm.linear` as one opaque operation: its blocks are no business of torch.compile."""
    return fp8_scaled_mm.linear(x, weight, weight_scale, input_scale, bias)


@fp8_static_linear.register_fake
def _fp8_static_linear_shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
