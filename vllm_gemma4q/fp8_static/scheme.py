"""Recognise FP8 with static scales from a `quantization_config` alone, whoever wrote it.

    fp8                 AutoFP8, llm-compressor's old exports and ours: `activation_scheme: static`, no weight blocks
    compressed-tensors  `format: float-quantized`; every group: E4M3 weights per tensor or per channel, static E4M3
                        inputs per tensor, targets `Linear`

Everything else (dynamic activations, blocks, other targets or formats) is left to vLLM. Nothing here needs vLLM.

Source: vLLM 0.32 `quantization/fp8.py`, compressed-tensors `QuantizationArgs`.
"""

from collections.abc import Mapping
from typing import Any

from vllm_gemma4q.fp8_static.format import METHOD
from vllm_gemma4q.name_patterns import names_of
from vllm_gemma4q.quark_int8.scheme import is_gemma4

METHOD_NAME = "gemma4q_fp8_static"
COMPRESSED_TENSORS = "compressed-tensors"

_FLOAT8 = {"num_bits": 8, "type": "float"}
_LEFT_TO_VLLM = ("kv_cache_scheme", "sparsity_config", "transform_config")


def claims(quantization_config: Mapping[str, Any], user_method: str | None, model_config: Any) -> bool:
    """Whether a checkpoint is a Gemma 4 in exactly this scheme, and nobody asked for another method.

    Args:
        quantization_config: the entry of `config.json`.
        user_method: the engine's `--quantization`, None where not given.
        model_config: the checkpoint's transformers configuration, None where unknown.
    """
    if user_method not in (None, METHOD_NAME, quantization_config.get("quant_method")):
        return False
    return is_gemma4(model_config) and is_fp8_static(quantization_config)


def is_fp8_static(quantization_config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is FP8 with static scales for every linear that it quantizes."""
    method = quantization_config.get("quant_method")
    if method == METHOD:
        blocks = quantization_config.get("weight_block_size") or quantization_config.get("store_dtype")
        return quantization_config.get("activation_scheme") == "static" and not blocks
    return method == COMPRESSED_TENSORS and _is_float_quantized(quantization_config)


def ignored_names(quantization_config: Mapping[str, Any]) -> tuple[str, ...]:
    """The list of modules that are not quantized, under any of its three names. Raises InputError: it is no list."""
    for key in ("ignored_layers", "modules_to_not_convert", "ignore"):
        if names := quantization_config.get(key):
            return names_of(key, names)
    return ()


def _is_float_quantized(config: Mapping[str, Any]) -> bool:
    if config.get("format") != "float-quantized" or any(config.get(key) for key in _LEFT_TO_VLLM):
        return False
    groups = config.get("config_groups")
    return isinstance(groups, Mapping) and bool(groups) and all(map(_is_static_group, groups.values()))


def _is_static_group(group: Any) -> bool:
    if not isinstance(group, Mapping) or group.get("targets") != ["Linear"] or group.get("output_activations"):
        return False
    weights, inputs = group.get("weights"), group.get("input_activations")
    return _is_static(weights, ("tensor", "channel")) and _is_static(inputs, ("tensor",))


def _is_static(arguments: Any, strategies: tuple[str, ...]) -> bool:
    if not isinstance(arguments, Mapping) or any(arguments.get(key) != value for key, value in _FLOAT8.items()):
        return False
    static = not arguments.get("dynamic") and arguments.get("symmetric", True)
    return bool(static) and arguments.get("strategy") in strategies
