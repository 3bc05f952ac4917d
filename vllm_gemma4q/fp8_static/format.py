"""The FP8 static checkpoint, exactly: tensors and `quantization_config`.

A linear is quantized when its weight is stored as `F8_E4M3` (`float8_e4m3fn`: no infinities, NaN is 0x7F and 0xFF
and never written, largest value 448). Real weight = code * weight_scale; the engine divides the input by
`input_scale`, saturates at +-448, rounds to E4M3, and multiplies the product by both scales.

    module X (every attention and MLP linear of the language model, and every linear of every expert)
    X.weight         F8_E4M3  [N, K]
    X.weight_scale   F32      []       per-tensor weights (the default)
                     F32      [N, 1]   per-channel weights
    X.input_scale    F32      []       always

Experts are stored one by one, `...layers.L.experts.E.{gate_proj,up_proj,down_proj}`: the only layout that vLLM 0.32
loads with scales (fused 3-D experts with scales have no place there). Linears that read the same input have the same
input_scale: q_proj, k_proj and v_proj of a layer, gate_proj and up_proj, and gate_proj and up_proj of all experts of a
layer; so have their down_proj, for vLLM takes the largest input_scale of a layer's experts anyway. weight_scale is each
linear's own. Stock vLLM rounds fused linears (qkv, gate and up, an expert's too) again to the largest of theirs, so
theirs are powers of two apart: then only subnormal codes can change.
All other tensors are the source's, bit for bit. KV cache scales are not written.

Per tensor, config.json says `quant_method: fp8`, `activation_scheme: static`, and lists in `ignored_layers` the full
Hugging Face name of every linear that is not quantized. That list is read literally: no globs, prefixes or `re:`.
vLLM's `fp8` method has no per-channel weights, so they are written as compressed-tensors (`float-quantized`, strategy
`channel` for weights and static `tensor` for inputs), whose list is called `ignore`. vLLM 0.32 takes those for
dense models; its experts want dynamic activations with per-channel weights.

Source: vLLM 0.32 `quantization/fp8.py`, `compressed_tensors_w8a8_fp8.py`, `fused_moe/routed_experts.py`,
`model_executor/parameter.py`.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

METHOD = "fp8"
WEIGHT_DTYPE = "F8_E4M3"
SCALE_DTYPE = "F32"
INPUT_SCALE = "input_scale"
MAX = 448.0
MIN_SUBNORMAL = 2.0**-9


class Granularity(StrEnum):
    """What shares one weight_scale."""

    TENSOR = "per-tensor"
    CHANNEL = "per-channel"


def weight_scale_shape(granularity: Granularity, rows: int) -> tuple[int, ...]:
    """Shape of a linear's weight_scale; `rows` is its number of outputs."""
    return () if granularity is Granularity.TENSOR else (rows, 1)


def quantization_config(ignored: Sequence[str], granularity: Granularity = Granularity.TENSOR) -> dict[str, Any]:
    """What goes under `quantization_config` in config.json.

    Args:
        ignored: full names of the linear modules that are not quantized.
    """
    if granularity is Granularity.TENSOR:
        return {"quant_method": METHOD, "activation_scheme": "static", "ignored_layers": list(ignored)}
    group = {
        "targets": ["Linear"],
        "weights": _arguments("channel"),
        "input_activations": _arguments("tensor"),
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }


def _arguments(strategy: str) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": False,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
