"""How much each expert matters: published recipes, one small function each, from what a calibration counted.

A recipe takes `Evidence` and returns float64 [layers, experts], higher is kept; scores are compared within a layer.
Notation of `calibration.statistics.Routing`: for tokens t routed to expert e, f its output, g its gate (softmax over
all experts, the chosen ones renormalised to 1, times `per_expert_scale`).

Sources: the published 98-expert Gemma 4 prunes (v3, v4, v5-coder); REAP, arXiv 2510.13999; MAN and MSAN, 2606.15716;
EASY-EP, 2504.06792; AIMER, 2603.18492 (in `weight_scores.py`: it needs no calibration).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from vllm_gemma4q.architecture import layer_index
from vllm_gemma4q.calibration.statistics import Array, Routing, Statistics
from vllm_gemma4q.errors import InputError

ALPHA = 2.0  # of the published prunes: weight of the contribution beside the count
BREADTH = 0.5  # v5-coder: weight of the mean over classes beside the best class
FLOOR_OF_98 = (75, 95)  # v5-coder: experts of 98 that v4 protects in the least and in the most concentrated layer


@dataclass(frozen=True)
class Evidence:
    """What the recipes see.

    Attributes:
        layers: of every layer, what the router chose.
        classes: of every sample, the text it was cut from: a class of use.
        class_weights: how much each class counts, for the recipe that asks; 1 by default.
        keep: experts a layer that will stay.
    """

    layers: Sequence[Routing]
    classes: Array
    class_weights: Mapping[int, float] = field(default_factory=dict)
    keep: int = 0

    @cached_property
    def by_class(self) -> Array:
        """float64 [classes, layers, experts]: of each class, alpha x contribution + count, summed over its samples."""
        found = []
        for number in np.unique(self.classes):
            chosen = self.classes == number
            found.append(
                [
                    ALPHA * layer.sample_gated_norm[chosen].sum(0, dtype=np.float64) + layer.sample_count[chosen].sum(0)
                    for layer in self.layers
                ]
            )
        return np.array(found, np.float64)

    @cached_property
    def weights(self) -> Array:
        """float64 [classes]."""
        return np.array([self.class_weights.get(int(number), 1.0) for number in np.unique(self.classes)])


Recipe = Callable[[Evidence], Array]


def evidence(
    statistics: Statistics, keep: int, class_weights: Mapping[str, float] | None = None
) -> tuple[Evidence, tuple[str, ...]]:
    """What a statistics file knows of experts, and the names of its classes.

    Raises:
        InputError: it is of a dense model, of one with differing numbers of experts, or has no text of a class.
    """
    if not statistics.experts:
        raise InputError(f"{statistics.path.name}: statistics of a dense model, expected one with experts")
    names = tuple(str(text["name"]) for text in statistics.details["texts"])
    weights = {}
    for name, weight in (class_weights or {}).items():
        if name not in names:
            raise InputError(f"class {name}: not calibrated on, expected one of {', '.join(names)}")
        weights[names.index(name)] = weight
    layers = [statistics.routing(name) for name in sorted(statistics.experts, key=layer_index)]
    counts = sorted({len(layer.count) for layer in layers})
    if len(counts) > 1:
        raise InputError(
            f"{statistics.path.name}: statistics of a model that was pruned: layers with {counts[0]} to {counts[-1]} "
            "experts, expected as many in all"
        )
    return Evidence(layers, statistics.samples()[0], weights, keep), names


def v3(found: Evidence) -> Array:
    """Sum over samples of alpha x ||g f|| (Frobenius, over the sample's tokens) + tokens routed."""
    total: Array = found.by_class.sum(0)
    return total


def v4(found: Evidence) -> Array:
    """The most that any class needs it: v3 of each class over its mean expert's."""
    most: Array = _normalized(found).max(0)
    return most


def v5_coder(found: Evidence) -> Array:
    """Percentile ranks by class, weighted: the best of them + 0.5 x their mean; a floor of v4's best stays in any case.

    The floor of a layer lies between 75 and 95 of 98 (the same shares of another number), linear in the mean v4 score
    of the experts that v4 would keep: between the layers where that is least and most.
    """
    classes, safe = _normalized(found), v4(found)
    ranks = classes.argsort(-1, kind="stable").argsort(-1) / max(classes.shape[-1] - 1, 1)
    scores = (found.weights[:, None, None] * ranks).max(0) + BREADTH * ranks.mean(0)
    order = (-safe).argsort(-1, kind="stable")
    relevance = np.take_along_axis(safe, order, -1)[:, : found.keep].mean(-1)
    spread = float(np.ptp(relevance))
    share = (relevance - relevance.min()) / spread if spread else np.ones(len(relevance))
    least, most = FLOOR_OF_98
    floors = np.floor((least + (most - least) * share) * found.keep / 98).astype(int)
    above = scores.max() + 1
    for layer, floor in enumerate(floors):
        scores[layer, order[layer, :floor]] += above
    return np.asarray(scores)


def reap(found: Evidence) -> Array:
    """Mean of g ||f|| over the tokens routed to it."""
    return _per_token(found, "gated_norm_sum")


def contribution(found: Evidence) -> Array:
    """Sum of g ||f||: REAP that counts how often, too."""
    return _stacked(found, "gated_norm_sum")


def man(found: Evidence) -> Array:
    """Mean of ||f||, gate-free."""
    return _per_token(found, "norm_sum")


def msan(found: Evidence) -> Array:
    """Mean of ||f||^2, gate-free."""
    return _per_token(found, "norm_square_sum")


def easy_ep(found: Evidence) -> Array:
    """Sum of g ||f|| weighted by how much the experts turn the token's hidden state."""
    return _stacked(found, "contribution_sum")


def frequency(found: Evidence) -> Array:
    """Tokens routed."""
    return _stacked(found, "count")


def probability(found: Evidence) -> Array:
    """Sum of the router's probabilities over all tokens, chosen or not."""
    return _stacked(found, "probability_sum")


RECIPES: Mapping[str, Recipe] = {
    "v3": v3,
    "v4": v4,
    "v5-coder": v5_coder,
    "reap": reap,
    "contribution": contribution,
    "man": man,
    "msan": msan,
    "easy-ep": easy_ep,
    "frequency": frequency,
    "probability": probability,
}


def _normalized(found: Evidence) -> Array:
    means = found.by_class.mean(-1, keepdims=True)
    return np.asarray(found.by_class / np.where(means > 0, means, 1))


def _stacked(found: Evidence, name: str) -> Array:
    return np.array([getattr(layer, name) for layer in found.layers], np.float64)


def _per_token(found: Evidence, name: str) -> Array:
    return np.asarray(_stacked(found, name) / np.maximum(_stacked(found, "count"), 1))
