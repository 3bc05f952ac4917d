"""What a `quantization_config` asks for: which list names what is not quantized, which scales a linear needs.

fp8 (AutoFP8, this package, transformers): `ignored_layers` or `modules_to_not_convert`; a weight needs weight_scale
(weight_scale_inv where quantized in blocks), and input_scale when activations are static, which early AutoFP8 called
act_scale. quark (INT8): `exclude`, weight_scale. compressed-tensors: `ignore`, weight_scale, input_scale when static.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.name_patterns import names_of
from vllm_gemma4q.restore.names import is_fused

METHODS = ("fp8", "quark", "compressed-tensors")
_FP8_LISTS = ("ignored_layers", "modules_to_not_convert")
_RENAMED = {"act_scale": "input_scale"}
_STATIC = ("input_scale", "act_scale")
_INPUT_SCALES = tuple(f"{joint}{name}" for name in _STATIC for joint in "._")
# How files name what belongs to a fused expert tensor, after the tensor's own name.
_FUSED_JOINTS = (".", "_")


@dataclass(frozen=True)
class Format:
    """One checkpoint's.

    Attributes:
        method: `quant_method`.
        lists: keys of the list of modules that are not quantized; the first is the one to be written.
        needs: names of the tensors that a quantized weight needs beside it, alternatives in a tuple.
    """

    method: str
    lists: tuple[str, ...]
    needs: tuple[tuple[str, ...], ...]

    def is_orphan(self, name: str) -> bool:
        """Whether a tensor of a quantized linear has no use: engines that scale inputs while serving refuse it."""
        return name.endswith(_INPUT_SCALES) and _STATIC not in self.needs

    def missing(self, weight: str, names: Mapping[str, Any]) -> str | None:
        """A scale that a quantized weight should have and that is not in `names`; all names canonical."""
        if weight.endswith(".weight_packed"):
            return None if weight.removesuffix("_packed") + "_scale" in names else "weight_scale"
        module, joints = weight.removesuffix(".weight"), _FUSED_JOINTS if is_fused(weight) else (".",)
        for alternatives in self.needs:
            candidates = [module + joint + name for joint in joints for name in alternatives]
            if is_fused(weight) and alternatives[0] == "weight_scale":
                candidates += [f"{module}_scale", f"{module}.scale"]
            if not any(candidate in names for candidate in candidates):
                return alternatives[0]
        return None


def parse_format(config: Mapping[str, Any]) -> Format:
    """Raises InputError: no `quantization_config`, one of a method that is not known here, or one that is damaged."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        raise InputError("config.json: got no quantization_config, expected a quantized checkpoint")
    method = quantization.get("quant_method")
    if method == "fp8":
        blocks = quantization.get("weight_block_size") is not None
        static = quantization.get("activation_scheme") == "static"
        present = [key for key in _FP8_LISTS if key in quantization] or list(_FP8_LISTS[:1])
        return Format(method, tuple(present), _needs("weight_scale_inv" if blocks else "weight_scale", static))
    if method == "quark":
        return Format(method, ("exclude",), _needs("weight_scale", False))
    if method == "compressed-tensors":
        activations = list(_activations(quantization))
        static = any(found and not found.get("dynamic") for found in activations)
        return Format(method, ("ignore",), _needs("weight_scale", static))
    raise InputError(f"config.json: quant_method is {method!r}, expected one of {', '.join(METHODS)}")


def _activations(quantization: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """How each group of linears has its inputs quantized."""
    for name, group in _object("config_groups", quantization.get("config_groups")).items():
        yield _object("input_activations", _object(name, group).get("input_activations"))


def _object(key: str, value: Any) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"config.json: quantization_config: {key} is {value!r}, expected an object")
    return value or {}


def _needs(weight_scale: str, static: bool) -> tuple[tuple[str, ...], ...]:
    return ((weight_scale,), _STATIC) if static else ((weight_scale,),)


def listed(config: Mapping[str, Any], form: Format) -> list[str]:
    """What the configuration says is not quantized. Raises InputError: its list is none."""
    found = config["quantization_config"]
    return [name for key in form.lists for name in names_of(key, found.get(key) or ())]


def with_list(config: Mapping[str, Any], form: Format, modules: Sequence[str]) -> dict[str, Any]:
    """The configuration with another list."""
    lists = {key: list(modules) for key in form.lists}
    return {**config, "quantization_config": {**config["quantization_config"], **lists}}


def current_name(name: str) -> str:
    """A tensor's name as engines read it today."""
    prefix, dot, last = name.rpartition(".")
    return prefix + dot + _RENAMED.get(last, last)
