"""Gemma 4's tensor names, shapes and traits: the one place that knows them.

Names are those of Hugging Face checkpoints (`Gemma4ForConditionalGeneration`, and the text-only
`Gemma4ForCausalLM` whose language model sits at `model.` instead of `model.language_model.`).
Shapes follow the text configuration, in either of the two forms transformers writes: plain keys
(`global_head_dim`, `num_global_key_value_heads`) or `per_layer_config`. One key is ours: pruned models whose layers
keep different numbers of experts have them in `num_experts_per_layer`, and the largest in `num_experts`.

Source: transformers `models/gemma4`, vLLM `model_executor/models/gemma4.py`. Vision and audio
towers are recognised by name and never described further: nothing here quantizes them.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

from vllm_gemma4q.errors import InputError

ARCHITECTURES = ("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM")
MODEL_TYPES = ("gemma4", "gemma4_text")

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"
EXPERTS_PER_LAYER = "num_experts_per_layer"
DEFAULT_GLOBAL_HEAD_DIM = 512  # what transformers assumes where the key is absent
# Far above any model's, and far below what takes long to count.
_MAX_SIZE = 2**31 - 1
MAX_LAYERS = 1000
_MAX_SIZES: Mapping[str, int] = {"num_hidden_layers": MAX_LAYERS, "num_experts": 1024, "num_attention_heads": 4096}

# Modules that vLLM fuses into one, in the order of their rows.
FUSED_SHARDS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
EXPERT_SHARDS = ("gate_proj", "up_proj", "down_proj")


class Role(StrEnum):
    """What a tensor is for: decides whether a scheme may quantize it."""

    ATTENTION = "attention"
    MLP = "mlp"
    EXPERTS = "experts"
    PER_LAYER_INPUT = "per_layer_input"
    ROUTER = "router"
    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    NORM = "norm"
    VISION = "vision"
    EMBED_VISION = "embed_vision"
    AUDIO = "audio"
    OTHER = "other"


LINEAR_ROLES = frozenset({Role.ATTENTION, Role.MLP, Role.EXPERTS, Role.PER_LAYER_INPUT})

_LAYER = re.compile(
    r"^(?:model\.language_model|language_model\.model|model)\.layers\.(?P<index>[0-9]{1,6})\.(?P<rest>.+)$"
)
_TOWERS = (
    (re.compile(r"(?:^|\.)vision_tower\."), Role.VISION),
    (re.compile(r"(?:^|\.)embed_vision\."), Role.EMBED_VISION),
    (re.compile(r"(?:^|\.)(?:audio_tower|embed_audio)\."), Role.AUDIO),
)
_LAYER_ROLES = (
    (re.compile(r"^self_attn\.[qkvo]_proj\b"), Role.ATTENTION),
    (re.compile(r"^mlp\.(?:gate|up|down)_proj\b"), Role.MLP),
    (re.compile(r"^experts\."), Role.EXPERTS),
    (re.compile(r"^router\."), Role.ROUTER),
    (re.compile(r"^per_layer_(?:input_gate|projection)\b"), Role.PER_LAYER_INPUT),
    (re.compile(r"norm(?:_[12])?\.weight(?:_scale)?$|^layer_scalar$"), Role.NORM),
)
_TOP_ROLES = (
    (re.compile(r"(?:^|\.)lm_head\."), Role.LM_HEAD),
    (re.compile(r"(?:^|\.)embed_tokens(?:_per_layer)?\."), Role.EMBEDDING),
    (re.compile(r"(?:^|\.)per_layer_model_projection\."), Role.PER_LAYER_INPUT),
    (re.compile(r"norm\.weight$"), Role.NORM),
)


@lru_cache(maxsize=1 << 16)  # a mixture has 24,000 names, and each is asked about often
def role_of(name: str) -> Role:
    """The role of a tensor or module, by its Hugging Face name."""
    for pattern, role in _TOWERS:
        if pattern.search(name):
            return role
    match = _LAYER.match(name)
    rest, rules = (match["rest"], _LAYER_ROLES) if match else (name, _TOP_ROLES)
    for pattern, role in rules:
        if pattern.search(rest):
            return role
    return Role.OTHER


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor or module belongs to, by its full name; None outside of them."""
    match = _LAYER.match(name)
    return int(match["index"]) if match else None


def layer_index(name: str) -> int:
    """The decoder layer that a tensor or module of one belongs to.

    Raises:
        InputError: it is outside of them.
    """
    index = layer_of(name)
    if index is None:
        raise InputError(f"tensor {name}: got a name outside of the decoder layers, expected one of a layer")
    return index


def is_linear_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear of the language model, fused experts included."""
    if role_of(name) not in LINEAR_ROLES:
        return False
    return len(shape) == 3 if is_fused_experts(name) else name.endswith(".weight") and len(shape) == 2


def is_fused_experts(name: str) -> bool:
    """Whether a tensor holds all experts of a layer in one 3-D array (`experts.gate_up_proj`, `experts.down_proj`)."""
    return re.search(r"\.experts\.(?:gate_up_proj|down_proj)$", name) is not None


@dataclass(frozen=True)
class Layer:
    """Sizes of one decoder layer; `num_experts` is None in dense models."""

    index: int
    layer_type: str
    head_dim: int
    num_key_value_heads: int
    intermediate_size: int
    has_key_value: bool
    has_value: bool
    num_experts: int | None


@dataclass(frozen=True)
class TextArchitecture:
    """The language model of one checkpoint, parsed once from its configuration.

    Attributes:
        num_experts: of the layer that has most; None in dense models.
    """

    root: str
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    layers: tuple[Layer, ...]
    num_experts: int | None
    top_k_experts: int | None
    moe_intermediate_size: int | None
    tie_word_embeddings: bool
    per_layer_input_size: int
    per_layer_input_vocab_size: int

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the language model, in the layout of published BF16 checkpoints."""
        hidden = self.hidden_size
        yield f"{self.root}embed_tokens.weight", (self.vocab_size, hidden)
        for layer in self.layers:
            prefix = f"{self.root}layers.{layer.index}."
            for name, shape in self._layer_shapes(layer):
                yield prefix + name, shape
        if self.per_layer_input_size:
            total = len(self.layers) * self.per_layer_input_size
            yield f"{self.root}embed_tokens_per_layer.weight", (self.per_layer_input_vocab_size, total)
            yield f"{self.root}per_layer_model_projection.weight", (total, hidden)
            yield f"{self.root}per_layer_projection_norm.weight", (self.per_layer_input_size,)
        yield f"{self.root}norm.weight", (hidden,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, hidden)

    def _layer_shapes(self, layer: Layer) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, inner = self.hidden_size, layer.intermediate_size
        queries = self.num_attention_heads * layer.head_dim
        keys = layer.num_key_value_heads * layer.head_dim
        yield "self_attn.q_proj.weight", (queries, hidden)
        yield "self_attn.q_norm.weight", (layer.head_dim,)
        if layer.has_key_value:
            yield "self_attn.k_proj.weight", (keys, hidden)
            yield "self_attn.k_norm.weight", (layer.head_dim,)
        if layer.has_value:
            yield "self_attn.v_proj.weight", (keys, hidden)
        yield "self_attn.o_proj.weight", (hidden, queries)
        yield "mlp.gate_proj.weight", (inner, hidden)
        yield "mlp.up_proj.weight", (inner, hidden)
        yield "mlp.down_proj.weight", (hidden, inner)
        norms = ["input", "post_attention", "pre_feedforward", "post_feedforward"]
        for norm in norms:
            yield f"{norm}_layernorm.weight", (hidden,)
        yield "layer_scalar", (1,)
        if layer.num_experts is not None and self.moe_intermediate_size is not None:
            experts, width = layer.num_experts, self.moe_intermediate_size
            yield "experts.gate_up_proj", (experts, 2 * width, hidden)
            yield "experts.down_proj", (experts, hidden, width)
            yield "router.proj.weight", (experts, hidden)
            yield "router.scale", (hidden,)
            yield "router.per_expert_scale", (experts,)
            for norm in ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2"):
                yield f"{norm}.weight", (hidden,)
        if self.per_layer_input_size:
            yield "per_layer_input_gate.weight", (self.per_layer_input_size, hidden)
            yield "per_layer_projection.weight", (hidden, self.per_layer_input_size)
            yield "post_per_layer_input_norm.weight", (hidden,)

    def parameters(self) -> int:
        """Number of parameters of the language model."""
        return sum(math.prod(shape) for _, shape in self.shapes())


def parse_text_architecture(config: Mapping[str, Any]) -> TextArchitecture:
    """Read the language model's sizes from a checkpoint's `config.json`.

    Raises:
        InputError: the configuration is not a Gemma 4, or a key that sizes need is missing or of the wrong type.
    """
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if model_type not in MODEL_TYPES:
        raise InputError(f"config.json: model_type is {model_type!r} ({architectures}), expected one of {MODEL_TYPES}")
    nested = "text_config" in config
    text = config["text_config"] if nested else config
    if not isinstance(text, Mapping):
        raise InputError(f"config.json: text_config is {type(text).__name__}, expected an object")
    counts = _parse_expert_counts(text)
    layers = tuple(_parse_layers(text, counts))
    num_experts = max(counts) if counts else None
    per_layer = _optional_size(text, "hidden_size_per_layer_input") or 0
    return TextArchitecture(
        root="model.language_model." if nested else "model.",
        hidden_size=_size(text, "hidden_size"),
        vocab_size=_size(text, "vocab_size"),
        num_attention_heads=_size(text, "num_attention_heads"),
        layers=layers,
        num_experts=num_experts,
        top_k_experts=_size(text, "top_k_experts") if num_experts is not None else None,
        moe_intermediate_size=_size(text, "moe_intermediate_size") if num_experts is not None else None,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))),
        per_layer_input_size=per_layer,
        per_layer_input_vocab_size=_optional_size(text, "vocab_size_per_layer_input") or 0,
    )


def _parse_expert_counts(text: Mapping[str, Any]) -> list[int] | None:
    """How many experts each layer has; None in dense models."""
    most, n_layers = _optional_size(text, "num_experts"), _size(text, "num_hidden_layers")
    if most is None or not text.get("enable_moe_block", True):
        return None
    counts, least = text.get(EXPERTS_PER_LAYER), _size(text, "top_k_experts")
    if counts is None:
        return [most] * n_layers
    key = f"config.json: {EXPERTS_PER_LAYER}"
    if not isinstance(counts, list) or len(counts) != n_layers:
        got = f"{len(counts)} entries" if isinstance(counts, list) else repr(counts)
        raise InputError(f"{key}: got {got}, expected a list of num_hidden_layers = {n_layers}")
    for index, count in enumerate(counts):
        if not isinstance(count, int) or isinstance(count, bool) or not least <= count <= most:
            wanted = f"an integer from top_k_experts = {least} to num_experts = {most}"
            raise InputError(f"{key}[{index}]: got {count!r}, expected {wanted}")
    if max(counts) != most:
        raise InputError(f"{key}: got at most {max(counts)}, expected num_experts = {most} in at least one layer")
    return counts


def _parse_layers(text: Mapping[str, Any], expert_counts: Sequence[int] | None) -> Iterator[Layer]:
    count = _size(text, "num_hidden_layers")
    types = text.get("layer_types") or _default_layer_types(count)
    if not isinstance(types, list) or not all(isinstance(item, str) for item in types):
        raise InputError(f"config.json: layer_types is {types!r}, expected a list of names")
    if len(types) != count:
        raise InputError(f"config.json: layer_types has {len(types)} entries, expected num_hidden_layers = {count}")
    overrides = text.get("per_layer_config")
    if overrides is not None and not _is_table(overrides):
        raise InputError(f"config.json: per_layer_config is {overrides!r}, expected an object of objects")
    key_equals_value = bool(text.get("attention_k_eq_v"))
    shared_from = count - (_optional_size(text, "num_kv_shared_layers") or 0)
    for index, layer_type in enumerate(types):
        is_full = layer_type == FULL_ATTENTION
        head_dim, heads = _size(text, "head_dim"), _size(text, "num_key_value_heads")
        if overrides is not None:
            override = overrides.get(str(index)) or {}
            head_dim = _optional_size(override, "head_dim") or head_dim
            heads = _optional_size(override, "num_key_value_heads") or heads
        elif is_full:
            head_dim = _optional_size(text, "global_head_dim") or DEFAULT_GLOBAL_HEAD_DIM
            heads = (_optional_size(text, "num_global_key_value_heads") if key_equals_value else None) or heads
        wide = bool(text.get("use_double_wide_mlp")) and 0 < shared_from <= index
        yield Layer(
            index=index,
            layer_type=layer_type,
            head_dim=head_dim,
            num_key_value_heads=heads,
            intermediate_size=_size(text, "intermediate_size") * (2 if wide else 1),
            has_key_value=index < shared_from,
            has_value=index < shared_from and not (is_full and key_equals_value),
            num_experts=expert_counts[index] if expert_counts else None,
        )


def _default_layer_types(count: int) -> list[str]:
    """Five sliding layers, then a full one; the last is always full (transformers `Gemma4TextConfig`)."""
    types = [SLIDING_ATTENTION if (index + 1) % 6 else FULL_ATTENTION for index in range(count)]
    return [*types[:-1], FULL_ATTENTION]


def _size(mapping: Mapping[str, Any], key: str) -> int:
    value = _optional_size(mapping, key)
    if not value:
        found = "missing" if value is None else value
        raise InputError(f"config.json: {key} is {found}, expected a positive integer")
    return value


def _optional_size(mapping: Mapping[str, Any], key: str) -> int | None:
    value = mapping.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"config.json: {key} is {value!r}, expected a non-negative integer")
    if value > (most := _MAX_SIZES.get(key, _MAX_SIZE)):
        raise InputError(f"config.json: {key} is {value}, expected at most {most}")
    return value


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and all(item is None or isinstance(item, Mapping) for item in value.values())
