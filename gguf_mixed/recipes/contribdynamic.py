"""ContribDynamic tiers: layers ranked by the energy of their inputs, three types by rank, one for attention.

Importance of a layer is the sum over its tensors of (sum of in_sum2 / sum of counts). The published counts are 1, 7 and
22 of 30 layers; for another depth n, the first two are n/30 and 7n/30 rounded to the nearest, the first at least 1,
and the last takes the rest. Embeddings and output are Q8_0. What does not fit a row (704, 2112) falls back.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from gemma4q_kernels.ggml import GGMLQuantizationType

from gguf_mixed.errors import InputError
from gguf_mixed.imatrix import Imatrix
from gguf_mixed.recipes.base import Choice, Material, Recipe, is_attention, is_embedding, quantizable
from gguf_mixed.tensors import Inventory

T = GGMLQuantizationType

EMBEDDING_TYPE = T.Q8_0
PUBLISHED_LAYERS, PUBLISHED_TOP, PUBLISHED_MIDDLE = 30, 1, 7


@dataclass(frozen=True)
class Tier:
    """Types of the most important layers, the next, the rest, and of attention in all of them."""

    top: GGMLQuantizationType
    middle: GGMLQuantizationType
    low: GGMLQuantizationType
    attention: GGMLQuantizationType


TIERS = {
    "cd-q6_k": Tier(T.Q8_0, T.Q6_K, T.Q5_K, T.Q8_0),
    "cd-q5_k_m": Tier(T.Q6_K, T.Q5_K, T.Q4_K, T.Q6_K),
    "cd-q4_k_m": Tier(T.Q5_K, T.Q4_K, T.Q3_K, T.Q5_K),
    "cd-q3_k_l": Tier(T.Q4_K, T.Q3_K, T.Q3_K, T.Q5_K),
    "cd-q2_k": Tier(T.Q3_K, T.Q2_K, T.Q2_K, T.Q4_K),
}


def contribdynamic(name: str) -> Recipe:
    """The recipe of one tier."""
    tier = TIERS[name]

    def recipe(material: Material) -> Choice:
        importance = layer_importance(material.inventory, material.require_imatrix(name))
        ranked = sorted(importance, key=lambda layer: (-importance[layer], layer))
        n_top, n_middle = split_layers(len(ranked))
        by_layer = {
            layer: tier.top if rank < n_top else tier.middle if rank < n_top + n_middle else tier.low
            for rank, layer in enumerate(ranked)
        }
        types = _types(material.inventory, tier, by_layer)
        return Choice(types, {"top_layers": ranked[:n_top], "middle_layers": ranked[n_top : n_top + n_middle]})

    return recipe


def split_layers(n_layers: int) -> tuple[int, int]:
    """How many layers are top and middle, of `n_layers`."""
    top = max(1, round(n_layers * PUBLISHED_TOP / PUBLISHED_LAYERS))
    return top, min(n_layers - top, round(n_layers * PUBLISHED_MIDDLE / PUBLISHED_LAYERS))


def layer_importance(inventory: Inventory, imatrix: Imatrix) -> dict[int, float]:
    """Energy of each layer's inputs.

    Raises:
        InputError: a layer without any data, or a model without layers.
    """
    found: dict[int, float] = {}
    seen = set()
    for tensor in quantizable(inventory):
        if tensor.layer is None:
            continue
        found.setdefault(tensor.layer, 0.0)
        entry = imatrix.entries.get(tensor.name)
        if entry is not None and entry.counts.any():
            found[tensor.layer] += float(entry.sums.sum(dtype="float64") / entry.counts.sum())
            seen.add(tensor.layer)
    missing = sorted(set(found) - seen)
    if missing or not found:
        raise InputError(f"imatrix: no data for layer {missing[0]}" if missing else "the model has no layers")
    return found


def _types(
    inventory: Inventory, tier: Tier, by_layer: Mapping[int, GGMLQuantizationType]
) -> dict[str, GGMLQuantizationType]:
    types = {}
    for tensor in quantizable(inventory):
        if is_embedding(tensor) or tensor.layer is None:
            types[tensor.name] = EMBEDDING_TYPE
        else:
            types[tensor.name] = tier.attention if is_attention(tensor) else by_layer[tensor.layer]
    return types
