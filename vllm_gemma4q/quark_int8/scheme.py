"""Recognise the one Quark scheme served here, from a `quantization_config` alone.

W8A8 INT8: weights int8, one scale per output channel, symmetric, static; activations int8, one scale
per token, symmetric, dynamic. Quark writes "per token" as `qscheme: per_channel` on a dynamic input.
Everything else (other dtypes, output or KV cache quantization, per-layer deviations) is left to vLLM.
Nothing here needs vLLM.

Source: AMD Quark 0.11 and 0.13 exports, vLLM `quantization/quark/quark.py`.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from vllm_gemma4q.architecture import ARCHITECTURES, MODEL_TYPES
from vllm_gemma4q.name_patterns import compile_pattern

METHOD_NAME = "gemma4q_quark_int8"

_GLOB = frozenset("*?[")

_WEIGHT = {"dtype": "int8", "qscheme": "per_channel", "symmetric": True}
_INPUT = {"dtype": "int8", "qscheme": "per_channel", "symmetric": True, "is_dynamic": True}


def claims(quantization_config: Mapping[str, Any], user_method: str | None, model_config: Any) -> bool:
    """Whether a checkpoint is a Gemma 4 in exactly this scheme, and nobody asked for another method.

    Args:
        quantization_config: the entry of `config.json`.
        user_method: the engine's `--quantization`, None where not given.
        model_config: the checkpoint's transformers configuration, None where unknown.
    """
    if user_method not in (None, "quark", METHOD_NAME):
        return False
    return is_gemma4(model_config) and is_w8a8_int8(quantization_config)


def is_gemma4(model_config: Any) -> bool:
    """Whether a transformers configuration describes a Gemma 4."""
    architectures = getattr(model_config, "architectures", None) or ()
    return getattr(model_config, "model_type", None) in MODEL_TYPES or any(a in ARCHITECTURES for a in architectures)


def is_w8a8_int8(quantization_config: Mapping[str, Any]) -> bool:
    """Whether a Quark `quantization_config` is W8A8 INT8 for every layer it names."""
    if quantization_config.get("quant_method") != "quark":
        return False
    exclude = quantization_config.get("exclude") or []
    if not isinstance(exclude, (list, tuple)) or not all(isinstance(rule, str) for rule in exclude):
        return False
    export = quantization_config.get("export") or {}
    if not isinstance(export, Mapping) or export.get("kv_cache_group"):
        return False
    if export.get("weight_format", "real_quantized") != "real_quantized":
        return False
    if quantization_config.get("kv_cache_quant_config") or quantization_config.get("softmax_quant_spec"):
        return False
    layers = [quantization_config.get("global_quant_config")]
    for key in ("layer_quant_config", "layer_type_quant_config"):
        own = quantization_config.get(key) or {}
        if not isinstance(own, Mapping):
            return False
        layers.extend(own.values())
    return all(_is_w8a8_int8_layer(layer) for layer in layers)


def _is_w8a8_int8_layer(layer: Any) -> bool:
    if not isinstance(layer, Mapping) or layer.get("output_tensors") or layer.get("bias"):
        return False
    weight, activation = _single(layer.get("weight")), _single(layer.get("input_tensors"))
    if not _has(weight, _WEIGHT) or not _has(activation, _INPUT):
        return False
    return not weight.get("is_dynamic") and weight.get("ch_axis", 0) in (0, None)


def _single(spec: Any) -> Mapping[str, Any]:
    """A tensor's specification; Quark may wrap it in a list of one."""
    if isinstance(spec, list) and len(spec) == 1:
        spec = spec[0]
    return spec if isinstance(spec, Mapping) else {}


def _has(spec: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return all(spec.get(key) == value for key, value in expected.items())


def is_excluded(names: Iterable[str], exclude: Iterable[str]) -> bool:
    """Whether an `exclude` list covers a module, by any of the names it goes by.

    Args:
        names: the module's names, such as the checkpoint's and the engine's.
        exclude: exact names, globs (`*vision_tower*`) and `re:` patterns, matched from the start.

    Raises:
        InputError: a pattern is none (see `compile_pattern`).
    """
    names = tuple(names)
    return any(_matches(names, rule) for rule in exclude)


def _matches(names: tuple[str, ...], rule: str) -> bool:
    if rule.startswith("re:"):
        return any(compile_pattern(rule).match(name) for name in names)
    if _GLOB.isdisjoint(rule):  # most rules, and lists are long
        return rule in names
    return any(fnmatch.fnmatchcase(name, rule) for name in names)
