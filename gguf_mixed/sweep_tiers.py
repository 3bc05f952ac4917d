"""The tiers of a sweep: which there are, and the plan of each from one error table.

A tier is a fixed recipe, or `optimal` for some bits a weight, or `optimal@RECIPE`: for the size of that recipe's file.
Its predicted divergence is the sum of the table's errors for the types that will be written, for fixed recipes too; it
is left out where the sensitivity was not measured, the weights are not at hand, or the table lacks a type.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gemma4q_kernels.ggml import GGMLQuantizationType

from gguf_mixed.error_table import ErrorTable
from gguf_mixed.errors import InputError
from gguf_mixed.overrides import override_table
from gguf_mixed.quantize import Job
from gguf_mixed.recipes import RECIPES, Choice, Material, find_recipe
from gguf_mixed.recipes.optimal import Budget, optimal
from gguf_mixed.sensitivity import Sensitivity
from gguf_mixed.sidecar import describe
from gguf_mixed.solver import Constraints

OPTIMAL = "optimal"
STOCK = "stock-"
NO_TIERS = "none"
DEFAULT_BPW = (3.0, 3.25, 3.5, 4.0, 4.5, 5.0, 6.0)
DEFAULT_MIXES = ("iq3_xxs", "iq3_m", "q3_k_m", "iq4_xs", "q4_k_m", "q5_k_m", "q6_k")


@dataclass(frozen=True)
class Tier:
    """One tier.

    Attributes:
        name: of its files.
        recipe: `optimal`, or a fixed one.
        bpw: optimal: bits a weight.
        like: optimal: the fixed recipe whose file size is the budget.
        asked: whether the user named it. A default tier that this model cannot have is left out; others are errors.
    """

    name: str
    recipe: str
    bpw: float | None = None
    like: str | None = None
    asked: bool = True


@dataclass(frozen=True)
class Planned:
    """A tier with its job and its sidecar.

    Attributes:
        divergence: predicted, in nats a token; None where it cannot be told.
        missing: types that the error table has no row for, so that nothing is predicted.
    """

    tier: Tier
    job: Job
    sidecar: dict[str, Any]
    divergence: float | None
    missing: tuple[str, ...]


def parse_tiers(recipes: str | None, bpw: str | None) -> list[Tier]:
    """The tiers that two lists with commas name; None is the default, `none` is an empty list.

    Raises:
        InputError: an unknown recipe, not a number, or nothing at all.
    """
    if bpw is None:
        tiers = [_by_bpw(bits, asked=False) for bits in DEFAULT_BPW]
    else:
        tiers = [_by_bpw(_number(text)) for text in _split(bpw)]
    if recipes is None:
        tiers += [Tier(f"{STOCK}{mix}", f"{STOCK}{mix}", asked=False) for mix in DEFAULT_MIXES]
    else:
        tiers += [_by_recipe(text) for text in _split(recipes)]
    if not tiers:
        raise InputError("no tiers: name some with --tiers or --bpw")
    return list({tier.name: tier for tier in tiers}.values())


@dataclass(frozen=True)
class Planner:
    """What the plans of all tiers share. `errors`: where those of the table come from, for the sidecars."""

    material: Material
    sensitivity: Sensitivity
    table: ErrorTable
    errors: str
    constraints: Constraints

    @property
    def predicts(self) -> bool:
        """Whether sums of the table's errors are divergences: not where sensitivity or weights are not known."""
        return self.sensitivity.measured and not self.material.inventory.header_only

    def plan(self, tier: Tier) -> Planned:
        """The plan of a tier.

        Raises:
            InputError: an impossible budget, or see the recipe.
        """
        if tier.recipe == OPTIMAL:
            budget = Budget(tier.bpw, None if tier.like is None else self._fixed(tier.like)[1].file_bytes)
            choice = optimal(self.material, self.table, budget, self.constraints)
            job = self._job(choice)
            described = self.sensitivity.source
        else:
            choice, job = self._fixed(tier.recipe)
            described = f"none: the recipe is a fixed rule; divergence predicted by {self.sensitivity.source}"
        errors = {name: self._by_type.get((name, job.written[name])) for name in job.table.types}
        missing = sorted({job.written[name].name for name, error in errors.items() if error is None})
        divergence = sum(error for error in errors.values() if error is not None)
        predicted = divergence if self.predicts and not missing else None
        sidecar = describe(job, choice.types, tier.recipe, choice.details, described, predicted, self.errors)
        return Planned(tier, job, sidecar, predicted, tuple(missing))

    @cached_property
    def _by_type(self) -> dict[tuple[str, GGMLQuantizationType], float]:
        return {(row.tensor, row.qtype): row.error for row in self.table}

    def _fixed(self, recipe: str) -> tuple[Choice, Job]:
        choice = find_recipe(recipe)(self.material)
        return choice, self._job(choice)

    def _job(self, choice: Choice) -> Job:
        material = self.material
        table = override_table(material.inventory, choice.types)
        return Job(material.inventory, table, material.imatrix, material.imatrix_path)


def _split(text: str) -> Iterable[str]:
    return [] if text == NO_TIERS else [part.strip().lower() for part in text.split(",")]


def _by_bpw(bits: float, asked: bool = True) -> Tier:
    return Tier(f"{OPTIMAL}-{bits:g}", OPTIMAL, bpw=bits, asked=asked)


def _number(text: str) -> float:
    try:
        bits = float(text)
    except ValueError:
        bits = 0.0
    if not 0 < bits < 64:
        raise InputError(f"--bpw {text}: expected bits a weight, as in 3.5,4,4.5")
    return bits


def _by_recipe(text: str) -> Tier:
    kind, at, like = text.partition("@")
    if at and kind == OPTIMAL:
        recipe = _known(like)
        return Tier(f"{OPTIMAL}@{recipe.removeprefix(STOCK)}", OPTIMAL, like=recipe)
    if text == OPTIMAL:
        raise InputError(f"--tiers {OPTIMAL}: at which size? {OPTIMAL}@stock-q4_k_m, or --bpw LIST")
    recipe = _known(text)
    return Tier(recipe, recipe)


def _known(recipe: str) -> str:
    """The full name: stock mixes may be named as llama-quantize does."""
    if recipe not in RECIPES and f"{STOCK}{recipe}" in RECIPES:
        return f"{STOCK}{recipe}"
    find_recipe(recipe)
    return recipe
