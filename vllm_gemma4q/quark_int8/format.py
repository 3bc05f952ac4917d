"""The `quantization_config` of a Quark W8A8 INT8 checkpoint.

Per linear `X`: `X.weight` I8 [N, K] and `X.weight_scale` F32 [N], real weight = int8 * scale, rounded as
amd-quark 0.13 does (`Int8PerChannelSpec(ch_axis=0)`; see `gemma4q_kernels.int8_scaled_mm.quantize`).
"""

from collections.abc import Sequence
from typing import Any

QUARK_VERSION = "0.13"


def quantization_config(exclude: Sequence[str]) -> dict[str, Any]:
    """What goes under `quantization_config` in config.json.

    Args:
        exclude: full names of the linear modules that stay unquantized. Engines match them exactly: a glob
            such as `*vision_tower*` would be ignored in silence.
    """
    return {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "version": QUARK_VERSION,
        "global_quant_config": {
            "weight": _tensor(is_dynamic=False, ch_axis=0),
            "input_tensors": _tensor(is_dynamic=True, ch_axis=1),
            "output_tensors": None,
            "bias": None,
            "target_device": None,
        },
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "kv_cache_post_rope": False,
        "softmax_quant_spec": None,
        "algo_config": None,
        "exclude": list(exclude),
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "order",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
    }


def _tensor(is_dynamic: bool, ch_axis: int) -> dict[str, Any]:
    return {
        "dtype": "int8",
        "is_dynamic": is_dynamic,
        "qscheme": "per_channel",
        "ch_axis": ch_axis,
        "group_size": None,
        "symmetric": True,
        "round_method": "half_even",
        "scale_type": "float",
        "scale_format": None,
        "scale_calculation_mode": None,
        "mx_element_dtype": None,
        "observer_cls": "PerChannelMinMaxObserver",
        "is_scale_quant": False,
    }
