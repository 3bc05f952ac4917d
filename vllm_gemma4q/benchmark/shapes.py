"""Sizes (N, K) of Gemma 4's linears as an engine runs them: q, k, v fused, gate and up fused, one rank's share.

A layer whose V equals its K loads K twice, as vLLM does; key heads that do not divide among ranks are repeated.
Not done here: the output layer, the vision tower, per-layer inputs.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_gemma4q.architecture import FULL_ATTENTION, Layer, TextArchitecture, parse_text_architecture
from vllm_gemma4q.errors import InputError

_COMMON: dict[str, Any] = {
    "model_type": "gemma4_text",
    "head_dim": 256,
    "global_head_dim": 512,
    "attention_k_eq_v": True,
}
_COMMON |= {"vocab_size": 262144}
# What decides sizes in the published configurations.
_31B = {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60, "num_attention_heads": 32}
_31B |= {"num_key_value_heads": 16, "num_global_key_value_heads": 4, **_COMMON}
_26B = {"hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30, "num_attention_heads": 16}
_26B |= {"num_key_value_heads": 8, "num_global_key_value_heads": 2, **_COMMON}
_26B |= {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
MODELS: Mapping[str, Mapping[str, Any]] = {"31B": _31B, "26B-A4B": _26B}


@dataclass(frozen=True, order=True)
class Shape:
    """A weight [n, k] of one rank; `name` lists the linears that have it."""

    n: int
    k: int
    name: str = ""


@dataclass(frozen=True)
class Experts:
    """The experts of a layer on one rank: w13 [count, 2 * width, hidden], w2 [count, hidden, width]."""

    count: int
    top_k: int
    hidden: int
    width: int


@dataclass(frozen=True)
class Sizes:
    """What a model multiplies with, each size once."""

    linears: tuple[Shape, ...]
    experts: tuple[Experts, ...]


def sizes_of(model: str | None, ranks: int = 1) -> Sizes:
    """Sizes of a model on each of `ranks` ranks.

    Args:
        model: a name in `MODELS`, a checkpoint folder, or its config.json; None: all of `MODELS`.

    Raises:
        InputError: no such model, a config.json that is not a Gemma 4's, sizes that do not divide among the ranks.
    """
    configs = MODELS.values() if model is None else [_config(model)]
    named: dict[tuple[int, int], list[str]] = {}
    experts: dict[Experts, None] = {}
    for config in configs:
        text = parse_text_architecture(config)
        for shape in _linears(text, ranks):
            names = named.setdefault((shape.n, shape.k), [])
            if shape.name not in names:
                names.append(shape.name)
        experts |= dict.fromkeys(_experts(text, ranks))
    return Sizes(tuple(Shape(n, k, ", ".join(names)) for (n, k), names in named.items()), tuple(experts))


def _config(model: str) -> Mapping[str, Any]:
    if model in MODELS:
        return MODELS[model]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{model}: {error.strerror}: expected a checkpoint folder or {', '.join(MODELS)}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: got {type(config).__name__}, expected an object")
    return config


def _linears(text: TextArchitecture, ranks: int) -> Iterator[Shape]:
    for layer in text.layers:
        kind = "global" if layer.layer_type == FULL_ATTENTION else "sliding"
        queries = _share("num_attention_heads", text.num_attention_heads, ranks) * layer.head_dim
        yield Shape(queries + _keys_and_values(layer, ranks), text.hidden_size, f"qkv {kind}")
        yield Shape(text.hidden_size, queries, f"o {kind}")
        inner = _share("intermediate_size", layer.intermediate_size, ranks)
        yield Shape(2 * inner, text.hidden_size, "gate_up")
        yield Shape(text.hidden_size, inner, "down")


def _keys_and_values(layer: Layer, ranks: int) -> int:
    return 2 * max(1, layer.num_key_value_heads // ranks) * layer.head_dim if layer.has_key_value else 0


def _experts(text: TextArchitecture, ranks: int) -> Iterator[Experts]:
    if text.top_k_experts is None or text.moe_intermediate_size is None:
        return
    width = _share("moe_intermediate_size", text.moe_intermediate_size, ranks)
    for layer in text.layers:
        if layer.num_experts is not None:
            yield Experts(layer.num_experts, text.top_k_experts, text.hidden_size, width)


def _share(key: str, size: int, ranks: int) -> int:
    if size % ranks:
        raise InputError(f"-tp {ranks}: {key} = {size} does not divide among {ranks} ranks")
    return size // ranks
