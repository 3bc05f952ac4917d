"""One choice of experts from start to drop map: which recipe scores them, and how many stay in each layer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from gguf_mixed.drop_map import RetainedExperts
from vllm_gemma4q.calibration.identity import check_same_model
from vllm_gemma4q.calibration.statistics import Array, Statistics
from vllm_gemma4q.checkpoint import Checkpoint
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.pruned_moe.mixture import mixture_of
from vllm_gemma4q.pruned_moe.scores import RECIPES, Evidence, evidence
from vllm_gemma4q.pruned_moe.select import best, turns
from vllm_gemma4q.pruned_moe.weight_scores import WEIGHT_RECIPES, weight_sums

DEFAULT = "contribution"
QUOTA, RANDOM = "quota", "random"
NAMES = (*RECIPES, QUOTA, *WEIGHT_RECIPES, RANDOM)

Progress = Callable[[int], object]


@dataclass
class Chooser:
    """Scores of a model's experts by any recipe.

    Attributes:
        source: the checkpoint; recipes from weights need it in BF16, F16 or F32.
        statistics: what `gemma4q calibrate` wrote for it, or for what it was quantized from.
        keep: experts a layer that will stay, on average.
        top_k: experts a token from now on; None for the model's.
        class_weights: by name of a text, for v5-coder.
        seed: of random scores.

    Raises:
        InputError: a dense model or a pruned one, statistics of another one, or too few or too many to keep.
    """

    source: Checkpoint
    statistics: Statistics | None
    keep: int
    class_weights: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    top_k: int | None = None
    _sums: Array | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        _, num_experts, top_k = mixture_of(self.source.config)
        top_k = self.top_k or top_k
        if not top_k <= self.keep <= num_experts:
            raise InputError(f"--keep: got {self.keep}, expected {top_k} (top_k)..{num_experts}")
        if self.statistics is not None and "quantization_config" not in self.source.config:
            check_same_model(self.statistics, self.source)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Layers, experts."""
        architecture, num_experts, _ = mixture_of(self.source.config)
        return len(architecture.layers), num_experts

    @property
    def available(self) -> list[str]:
        """Recipes that what is given suffices for."""
        from_weights = () if "quantization_config" in self.source.config else tuple(WEIGHT_RECIPES)
        from_statistics = () if self.statistics is None else (*RECIPES, QUOTA)
        return [*from_statistics, *from_weights, RANDOM]

    @property
    def at_hand(self) -> list[str]:
        """Those for which no weights must be read any more."""
        return [name for name in self.available if name not in WEIGHT_RECIPES or self._sums is not None]

    def read_weights(self, progress: Progress = lambda n_bytes: None) -> Array:
        """What recipes from weights need; read once. `progress` is called with bytes: `expert_bytes` in all."""
        if self._sums is None:
            self._sums = weight_sums(self.source, progress)
        return self._sums

    def scores(self, recipe: str) -> Array:
        """float64 [layers, experts], higher stays.

        Raises:
            InputError: the recipe needs statistics, or they are of a model of another shape.
        """
        if recipe == RANDOM:
            return np.random.default_rng(self.seed).random(self.shape)
        if recipe in WEIGHT_RECIPES:
            return WEIGHT_RECIPES[recipe](self.read_weights())
        found = -turns(self._evidence.by_class) if recipe == QUOTA else RECIPES[recipe](self._evidence)
        if found.shape != self.shape:
            raise InputError(f"statistics: of {found.shape} layers and experts, the model has {self.shape}")
        return found

    def uniform(self, recipe: str) -> RetainedExperts:
        """`keep` experts in every layer."""
        return best(self.scores(recipe), [self.keep] * self.shape[0])

    @cached_property
    def _evidence(self) -> Evidence:
        if self.statistics is None:
            raise InputError("--statistics is missing: what gemma4q calibrate wrote for this model")
        return evidence(self.statistics, self.keep, self.class_weights)[0]


def overlaps(retained: RetainedExperts, others: Mapping[str, RetainedExperts]) -> dict[str, float]:
    """Share of the dropped experts that each other choice drops, too."""
    mine = _dropped(retained)
    return {name: len(mine & _dropped(other)) / max(len(mine), 1) for name, other in others.items()}


def _dropped(retained: RetainedExperts) -> set[tuple[int, int]]:
    return {(layer, expert) for layer, ids in enumerate(retained.dropped) for expert in ids}
