"""How many experts each layer keeps when only their total is given: least sum of measured losses.

Layers differ in how much they lose. A layer's loss at a few counts is the divergence of the model with that layer alone
pruned (`judge` of `probes`); between them it is interpolated. The sum over layers stands for the loss of all of them
together, which is not quite true: judge the result.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from gguf_mixed.drop_map import RetainedExperts
from vllm_gemma4q.calibration.statistics import Array
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.pruned_moe.select import best

_DROPPED = (1.75, 1.25, 0.75, 0.25)  # what a layer is measured at, over what it drops on average


def probe_counts(num_experts: int, top_k: int, keep: int) -> list[int]:
    """Counts to measure a layer at, around `keep`, ascending, at least `top_k`."""
    dropped = num_experts - keep
    wanted = (num_experts - round(share * dropped) for share in _DROPPED)
    return sorted({max(min(count, num_experts - 1), top_k) for count in wanted})


def probes(scores: Array, counts: Sequence[int]) -> dict[str, RetainedExperts]:
    """One candidate a layer and count, by the name that `spread` looks for: all other layers keep everything."""
    n_layers, num_experts = scores.shape
    found = {}
    for layer in range(n_layers):
        for count in counts:
            everything = [num_experts] * n_layers
            everything[layer] = count
            found[_name(layer, count)] = best(scores, everything)
    return found


def spread(
    losses: Mapping[str, float], n_layers: int, counts: Sequence[int], num_experts: int, total: int
) -> list[int]:
    """Counts by layer that add up to `total`, with the least sum of losses; exact, by dynamic programming.

    Args:
        losses: of every one of `probes`, nats.
        counts: that were measured. Layers keep at least the smallest of them.
        total: experts of all layers together.

    Raises:
        InputError: no counts of that range add up to `total`.
    """
    lowest = min(counts)
    if not n_layers * lowest <= total <= n_layers * num_experts:
        raise InputError(f"got {total} experts to spread, expected {n_layers * lowest}..{n_layers * num_experts}")
    allowed = np.arange(lowest, num_experts + 1)
    measured = [*counts, num_experts]
    spare = total - n_layers * lowest
    least = np.full(spare + 1, np.inf)
    least[0] = 0.0
    chosen = np.zeros((n_layers, spare + 1), int)
    for layer in range(n_layers):
        found = [*(losses[_name(layer, count)] for count in counts), 0.0]
        curve = np.interp(allowed, measured, found)
        options = np.full((len(allowed), spare + 1), np.inf)
        for extra, loss in enumerate(curve[: spare + 1]):
            options[extra, extra:] = least[: spare + 1 - extra] + loss
        chosen[layer], least = options.argmin(0), options.min(0)
    result, left = [0] * n_layers, spare
    for layer in reversed(range(n_layers)):
        result[layer] = lowest + int(chosen[layer, left])
        left -= int(chosen[layer, left])
    return result


def _name(layer: int, count: int) -> str:
    return f"layer {layer}, {count} experts"
