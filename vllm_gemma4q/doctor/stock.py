"""How vLLM 0.32 itself decides what is quantized: its modules of Gemma 4, and each method's list as it reads it.

    quark                exact names and `re:` patterns; experts also by any name below theirs
    fp8                  exact names only; experts by any entry that contains theirs
    compressed-tensors   exact names and `re:` patterns; experts as the first expert's three linears

Names are mapped to the engine's first. A fused linear is listed under its own name, or with all of its shards, also
the v_proj that layers whose values are keys do not have. Globs and partial names are read by none, without a word.

Source: vLLM 0.32 `quantization/quark/utils.py`, `utils/quant_utils.py`, `utils/config_utils.py`, `compressed_tensors/`,
`models/gemma4.py`, `models/gemma4_mm.py`. Tested against these functions.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from vllm_gemma4q.architecture import EXPERT_SHARDS, FUSED_SHARDS, Role, TextArchitecture, role_of
from vllm_gemma4q.name_patterns import compile_pattern

QUARK, FP8, COMPRESSED_TENSORS = "quark", "fp8", "compressed-tensors"
METHODS = (QUARK, FP8, COMPRESSED_TENSORS)
# Every name that vLLM 0.32 knows; bitsandbytes and gguf, which other versions know, are not among them.
QUANTIZATION_METHODS = frozenset({
    "auto_awq", "auto_gptq", "awq", "awq_marlin", "compressed-tensors", "deepseek_v4_fp8", "experts_int8",
    "fbgemm_fp8", "fp8", "fp8_per_block", "fp8_per_channel", "fp8_per_tensor", "fp_quant", "gpt_oss_mxfp4", "gptq",
    "gptq_marlin", "humming", "inc", "int8_per_channel_weight_only", "modelopt", "modelopt_fp4", "modelopt_mixed",
    "modelopt_mxfp8", "moe_wna16", "mxfp4", "mxfp8", "nvfp4_per_token", "online", "quark", "torchao",
})  # fmt: skip
DEPRECATED_METHODS = frozenset({"fbgemm_fp8", "fp_quant"})  # which it refuses unless it is told not to
_ALIASES = {"auto-round": "inc"}  # by which checkpoints name a method
_TOWER_ROLES = frozenset({Role.VISION, Role.EMBED_VISION, Role.AUDIO})
_TOWER_LINEAR = re.compile(r"(?:_proj(?:ection)?|linear)\.(?:weight|weight_packed|qweight)$")
_ANY_SIZE = frozenset({"bitsandbytes", "torchao", COMPRESSED_TENSORS})  # methods that quantize any tower
_TOWER_MULTIPLE = 64  # of both sizes of the vision tower, for all others
_TEXT_ROOT, _ENGINE_ROOT = "model.language_model.", "language_model.model."
# In the order in which they are applied, each to the result of those before it.
_PREFIXES = (
    ("model.vision_tower", "vision_tower"),
    ("model.embed_vision", "embed_vision"),
    ("model.audio_tower.", "audio_tower."),
    ("model.embed_audio.", "embed_audio."),
    (_TEXT_ROOT, _ENGINE_ROOT),
    ("lm_head.", "language_model.lm_head."),
    ("model", "language_model.model"),
)


class Decision(StrEnum):
    """What a list makes of a module."""

    QUANTIZED = "quantized"
    IGNORED = "ignored"
    MIXED = "mixed"  # vLLM stops


@dataclass(frozen=True)
class Module:
    """A linear or a layer's experts, as vLLM builds it.

    Attributes:
        name: the engine's.
        shards: modules of the checkpoint that it is loaded from, by full name.
    """

    name: str
    shards: tuple[str, ...]

    @property
    def is_experts(self) -> bool:
        return self.name.endswith(".experts")


def engine_name(name: str, is_multimodal: bool) -> str:
    """vLLM's name of a module or of an entry of a list, by the checkpoint's."""
    if not is_multimodal:
        return name.replace(_TEXT_ROOT, "model.", 1) if name.startswith(_TEXT_ROOT) else name
    for prefix, replacement in _PREFIXES:
        if name.startswith(prefix):
            name = replacement + name[len(prefix) :]
    return name


def modules(architecture: TextArchitecture, config: Mapping[str, Any], names: Sequence[str]) -> Iterator[Module]:
    """Every module that vLLM asks a method for.

    Args:
        config: the checkpoint's.
        names: of its tensors.
    """
    is_multimodal = "text_config" in config
    root = architecture.root
    engine_root = engine_name(root, is_multimodal)
    for layer in architecture.layers:
        prefix = f"layers.{layer.index}."
        linears = ["self_attn.o_proj", "mlp.down_proj"] + ([] if layer.has_key_value else ["self_attn.q_proj"])
        if architecture.per_layer_input_size:
            linears += ["per_layer_input_gate", "per_layer_projection"]
        for linear in linears:
            yield Module(f"{engine_root}{prefix}{linear}", (f"{root}{prefix}{linear}",))
        if layer.has_key_value:
            shards = [shard for shard in FUSED_SHARDS["qkv_proj"] if shard != "v_proj" or layer.has_value]
            yield _fused(engine_root, root, f"{prefix}self_attn.", "qkv_proj", shards)
        yield _fused(engine_root, root, f"{prefix}mlp.", "gate_up_proj", FUSED_SHARDS["gate_up_proj"])
        if layer.num_experts is not None:
            yield Module(f"{engine_root}{prefix}experts", (f"{root}{prefix}experts",))
    if architecture.per_layer_input_size:
        yield Module(f"{engine_root}per_layer_model_projection", (f"{root}per_layer_model_projection",))
    for name in names:
        if is_tower_linear(name, config):
            module = name.rpartition(".")[0]
            yield Module(engine_name(module, is_multimodal), (module,))


def _fused(engine_root: str, root: str, prefix: str, fused: str, shards: Sequence[str]) -> Module:
    return Module(f"{engine_root}{prefix}{fused}", tuple(f"{root}{prefix}{shard}" for shard in shards))


def is_tower_linear(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is the weight of a tower's linear that vLLM asks a method for, as of the language model's."""
    if "text_config" not in config or _TOWER_LINEAR.search(name) is None or not _quantizes_towers(config):
        return False
    role = role_of(name)
    return role in _TOWER_ROLES and (role is not Role.AUDIO or bool(config.get("audio_config")))


def _quantizes_towers(config: Mapping[str, Any]) -> bool:
    vision, quantization = config.get("vision_config") or {}, config.get("quantization_config") or {}
    if method_of(quantization) in _ANY_SIZE or not isinstance(vision, Mapping):
        return True
    sizes = [vision.get("hidden_size"), vision.get("intermediate_size")]
    return all(isinstance(size, int) and size % _TOWER_MULTIPLE == 0 for size in sizes)


def method_of(quantization: Mapping[str, Any]) -> str | None:
    """`quant_method` as vLLM reads it, whether it knows it or not; None where it is no text.

    Empty where there is none: vLLM takes that for a checkpoint that is not quantized.
    """
    method = quantization.get("quant_method", "")
    if not isinstance(method, str):
        return None
    method = method.lower().replace("compressed_tensors", COMPRESSED_TENSORS)
    return _ALIASES.get(method, method)


class StockList:
    """A method's list, read as vLLM reads it.

    Args:
        method: one of `METHODS`.
        entries: as in config.json.
        is_multimodal: whether the checkpoint has towers, and so which names it uses.
    """

    def __init__(self, method: str, entries: Sequence[str], is_multimodal: bool) -> None:
        self.method = method
        self.entries = [self._mapped(entry, is_multimodal) for entry in entries]

    def _mapped(self, entry: str, is_multimodal: bool) -> str:
        keeps = self.method == COMPRESSED_TENSORS and ("." not in entry or entry.startswith("re:"))
        return entry if keeps else engine_name(entry, is_multimodal)

    def decide(self, module: Module) -> Decision:
        """What becomes of a module."""
        if module.is_experts:
            return self._experts(module.name)
        if self._matches(module.name):
            return Decision.IGNORED
        parent, _, last = module.name.rpartition(".")
        listed = {self._matches(f"{parent}.{shard}") for shard in FUSED_SHARDS.get(last, (last,))}
        if len(listed) == 2:
            return Decision.MIXED
        return Decision.IGNORED if True in listed else Decision.QUANTIZED

    def absent_shards(self, module: Module) -> list[str]:
        """Shards that the list lacks though it has others of the module's, by the engine's name."""
        parent, _, last = module.name.rpartition(".")
        names = [f"{parent}.{shard}" for shard in FUSED_SHARDS.get(last, (last,))]
        return [name for name in names if not self._matches(name)]

    def is_dead(self, entry: str, known: Sequence[str], is_multimodal: bool) -> bool:
        """Whether an entry names nothing among modules by the engine's name."""
        mapped = self._mapped(entry, is_multimodal)
        return not any(self._is_match(name, mapped) for name in known)

    def _experts(self, name: str) -> Decision:
        if self.method == FP8:
            return Decision.IGNORED if any(name in entry for entry in self.entries) else Decision.QUANTIZED
        if self.method == QUARK:
            below = (entry for entry in self.entries if not entry.startswith("re:"))
            listed = {self._matches(name) or any(entry.startswith(f"{name}.") for entry in below)}
        else:
            listed = {self._matches(f"{name}.0.{shard}") for shard in EXPERT_SHARDS}
        if len(listed) == 2:
            return Decision.MIXED
        return Decision.IGNORED if True in listed else Decision.QUANTIZED

    def _matches(self, name: str) -> bool:
        return any(self._is_match(name, entry) for entry in self.entries)

    def _is_match(self, name: str, entry: str) -> bool:
        if self.method != FP8 and entry.startswith("re:"):
            return compile_pattern(entry).match(name) is not None
        return name == entry
