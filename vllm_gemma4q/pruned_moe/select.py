"""From scores to experts that stay: the best of each layer, ties going to the lower number; quotas of classes."""

from collections.abc import Sequence

import numpy as np

from gguf_mixed.drop_map import RetainedExperts
from vllm_gemma4q.calibration.statistics import Array
from vllm_gemma4q.errors import InputError


def best(scores: Array, counts: Sequence[int]) -> RetainedExperts:
    """The `counts[layer]` best of each layer.

    Args:
        scores: float64 [layers, experts], higher stays.

    Raises:
        InputError: a count is not of 1..experts.
    """
    order = (-scores).argsort(-1, kind="stable")
    n_experts = scores.shape[1]
    for layer, count in enumerate(counts):
        if not 1 <= count <= n_experts:
            raise InputError(f"layer {layer}: got {count} experts to keep, expected 1..{n_experts}")
    kept = (tuple(sorted(order[layer, :count].tolist())) for layer, count in enumerate(counts))
    return RetainedExperts(n_experts, tuple(kept))


def turns(by_class: Array) -> Array:
    """Quotas: classes take turns, each with its best expert that is still free (arXiv 2607.01710).

    Args:
        by_class: float64 [classes, layers, experts], higher is better.

    Returns:
        float64 [layers, experts]: at which turn each expert is taken, 0 the first.
    """
    n_classes, n_layers, n_experts = by_class.shape
    preferences = (-by_class).argsort(-1, kind="stable")
    taken = np.full((n_layers, n_experts), -1.0)
    for layer in range(n_layers):
        for turn in range(n_experts):
            mine = preferences[turn % n_classes, layer]
            free = mine[taken[layer, mine] < 0]
            taken[layer, free[0]] = turn
    return taken
