"""The shapes that all files of one base share, whatever their format and however many experts were left out.

Read from config.json, or from a GGUF's metadata, without looking at weights. So two fine-tunes of one model have one
outline: that they are two is told by manifests, where there are any (`provenance.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from gguf_mixed.header import Header
from gguf_mixed.tensors import Inventory
from vllm_gemma4q.architecture import MAX_LAYERS, SLIDING_ATTENTION, TextArchitecture
from vllm_gemma4q.errors import InputError

_ARCHITECTURE = "gemma4"
_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class LayerOutline:
    """One decoder layer without its experts' number."""

    is_sliding: bool
    head_dim: int
    key_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class Outline:
    """The language model without the numbers of experts and without what a format may add, such as an output layer.

    Attributes:
        expert_size: width of an expert, 0 in dense models.
        caching_layers: those with keys and values of their own.
    """

    hidden_size: int
    vocabulary: int
    heads: int
    expert_size: int
    per_layer_input_size: int
    layers: tuple[LayerOutline, ...]
    caching_layers: int

    def difference(self, other: "Outline") -> tuple[str, object, object] | None:
        """The first thing that differs: what, here, and in `other`; None where both are of one base."""
        for field in fields(self):
            here, there = getattr(self, field.name), getattr(other, field.name)
            if here != there:
                return _layer_difference(here, there) if field.name == "layers" else (field.name, here, there)
        return None


def _layer_difference(
    here: tuple[LayerOutline, ...], there: tuple[LayerOutline, ...]
) -> tuple[str, object, object] | None:
    if len(here) != len(there):
        return "number of layers", len(here), len(there)
    for index, (one, two) in enumerate(zip(here, there, strict=True)):
        for field in fields(one):
            if (mine := getattr(one, field.name)) != (its := getattr(two, field.name)):
                return f"{field.name} of layer {index}", mine, its
    return None


def outline_of_config(architecture: TextArchitecture) -> Outline:
    """Of a checkpoint folder."""
    return Outline(
        hidden_size=architecture.hidden_size,
        vocabulary=architecture.vocab_size,
        heads=architecture.num_attention_heads,
        expert_size=architecture.moe_intermediate_size or 0,
        per_layer_input_size=architecture.per_layer_input_size,
        layers=tuple(
            LayerOutline(
                layer.layer_type == SLIDING_ATTENTION,
                layer.head_dim,
                layer.num_key_value_heads,
                layer.intermediate_size,
            )
            for layer in architecture.layers
        ),
        caching_layers=sum(layer.has_key_value for layer in architecture.layers),
    )


def outline_of_gguf(inventory: Inventory) -> Outline:
    """Of a GGUF file.

    Raises:
        InputError: a key of the metadata, or the embedding, is missing or of the wrong type.
    """
    header = inventory.headers[0]
    embedding = inventory.tensors.get(_EMBEDDING)
    if embedding is None:
        raise InputError(f"{header.path.name}: has no tensor {_EMBEDDING}")
    layers = _size(header, "block_count")
    if layers > MAX_LAYERS:
        raise InputError(f"{header.path.name}: block_count: got {layers}, expected at most {MAX_LAYERS}")
    wide, narrow = _size(header, "attention.key_length"), _size(header, "attention.key_length_swa")
    sliding = _each(header, "attention.sliding_window_pattern", layers)
    key_heads = _each(header, "attention.head_count_kv", layers)
    intermediate = _each(header, "feed_forward_length", layers)
    return Outline(
        hidden_size=_size(header, "embedding_length"),
        vocabulary=embedding.n_elements // embedding.row_length,
        heads=_size(header, "attention.head_count"),
        expert_size=_size(header, "expert_feed_forward_length", 0),
        per_layer_input_size=_size(header, "embedding_length_per_layer_input", 0),
        layers=tuple(
            LayerOutline(bool(window), narrow if window else wide, heads, inner)
            for window, heads, inner in zip(sliding, key_heads, intermediate, strict=True)
        ),
        caching_layers=layers - _size(header, "attention.shared_kv_layers", 0),
    )


def _each(header: Header, key: str, layers: int) -> Iterator[int]:
    """A value for each layer, which the file may hold once for all."""
    value = header.get(f"{_ARCHITECTURE}.{key}")
    values = value if isinstance(value, tuple) else (value,) * layers
    if len(values) != layers or not all(isinstance(item, int) for item in values):
        raise InputError(f"{header.path.name}: {_ARCHITECTURE}.{key}: got {value!r}, expected {layers} integers")
    return (int(item) for item in values if isinstance(item, int))


def _size(header: Header, key: str, default: int | None = None) -> int:
    value = header.get(f"{_ARCHITECTURE}.{key}")
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{header.path.name}: {_ARCHITECTURE}.{key}: got {value!r}, expected an integer")
    return value
