"""Linears: vLLM's own Quark scheme for per-channel int8 weights and per-token int8 activations.

The kernel is the one vLLM picks for the platform and `--linear-backend`, ours (`kernels.py`) among them; nothing is
chosen here.
"""

from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.quantization.quark.quark import QuarkLinearMethod

from vllm_gemma4q.compat import quark_linear_scheme
from vllm_gemma4q.quark_int8 import kernels

if TYPE_CHECKING:
    from vllm_gemma4q.quark_int8.config import QuarkInt8Config


def int8_linear_method(config: "QuarkInt8Config", layer: torch.nn.Module) -> QuarkLinearMethod:
    """The method for one linear; attaches the scheme to the layer, where `QuarkLinearMethod` looks for it."""
    kernels.register()
    layer.scheme = quark_linear_scheme()
    return QuarkLinearMethod(config)
