"""Linears on a GPU: `gemma4q_kernels.int8_scaled_mm` as one of vLLM's INT8 kernels. When it is chosen: `kernels.py`.

Weights stay [N, K] as loaded. One opaque operation quantizes tokens and multiplies: torch.compile does not trace the
choice of a tile, and CUDA graphs capture it, since nothing in it is tuned, timed or synchronized. The scratch it
allocates comes from the graph's own pool.

Tiles change with the number of tokens; Triton compiles each when it is first used, and keeps it on disk.

Not done here: static or asymmetric activations, a scale a tensor, tokens quantized by the operation before.
"""

import torch
from gemma4q_kernels.int8_scaled_mm.problem import check_weight
from gemma4q_kernels.support import triton_support
from vllm.model_executor.kernels.linear import (
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
    _get_linear_backend,
)
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_gemma4q.quark_int8.kernels import refusal

_MIN_CAPABILITY = 80  # tensor cores of NVIDIA's that Triton gives int8; AMD's numbers are all greater


class Gemma4qInt8LinearKernel(Int8ScaledMMLinearKernel):
    """out = q(x) @ w.T * x_scale * w_scale + bias, q() with a scale a token."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Whether this machine has a GPU that it runs on, or why not."""
        support = triton_support(torch.device(current_platform.device_type))
        if not support:
            return False, support.reason
        if compute_capability is None and (found := current_platform.get_device_capability()) is not None:
            compute_capability = found.to_int()
        if compute_capability is not None and compute_capability < _MIN_CAPABILITY:
            return False, f"needs compute capability {_MIN_CAPABILITY} or newer, got {compute_capability}"
        return True, None

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether it is wanted and fits the layer, or why not."""
        if not c.is_channelwise:
            return False, "needs a weight scale a channel, got one a tensor"
        if c.is_static_input_scheme:
            return False, "needs dynamic activation scales, got static ones"
        if not c.input_symmetric:
            return False, "needs symmetric activations, got zero points"
        reason = refusal(_get_linear_backend(quantization="int8_w8a8"))
        return reason is None, reason

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Leave int8 [N, K] and float32 [N, 1] as plain parameters, and no others.

        Raises:
            ValueError: a weight or scale of another shape or dtype.
        """
        weight, scale, input_scale, zero_point, azp_adj = self.layer_param_names
        w_q, w_scale = (getattr(layer, name).data.contiguous() for name in (weight, scale))
        check_weight(w_q, w_scale)
        for name, tensor in ((weight, w_q), (scale, w_scale)):
            replace_parameter(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
        for name in (input_scale, zero_point, azp_adj):
            setattr(layer, name, None)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[.., K] float -> [.., N] of its dtype."""
        w_q, w_scale, *_ = self._get_layer_params(layer)
        out: torch.Tensor = torch.ops.gemma4q.int8_linear(x, w_q, w_scale, bias)
        return out


def _int8_linear(x: torch.Tensor, w_q: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # Imported here: its module needs Triton, which machines without a GPU may lack.
    from gemma4q_kernels.int8_scaled_mm.triton import quantize_per_token, scaled_mm

    rows = x.reshape(-1, x.shape[-1])
    if not len(rows):
        return _like_output(x, w_q, w_scale, bias)
    x_q, x_scale = quantize_per_token(rows)
    return scaled_mm(x_q, x_scale, w_q, w_scale, bias, x.dtype).view(*x.shape[:-1], len(w_q))


def _like_output(x: torch.Tensor, w_q: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], w_q.shape[0]))


# As vLLM registers its own: `torch.library.custom_op` costs some ten microseconds more at each call.
_LIBRARY = torch.library.Library("gemma4q", "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op("int8_linear", _int8_linear, fake_impl=_like_output, target_lib=_LIBRARY)
