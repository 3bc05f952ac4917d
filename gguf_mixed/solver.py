"""Choose a type for every tensor: least total error within a budget of bytes, with proof.

A multiple-choice knapsack with groups, solved as a mixed-integer program by HiGHS (scipy.optimize.milp). The
solver's lower bound comes with the answer, so `gap` says how far from the best possible it can be at most.
Pure: a table and constraints in, an assignment out.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from gemma4q_kernels.ggml import GGMLQuantizationType, bits_per_weight
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from gguf_mixed.error_table import ErrorRow, ErrorTable, Pins
from gguf_mixed.errors import InputError
from gguf_mixed.native_output import native_output_discarded

RELATIVE_GAP = 1e-4
TIME_LIMIT_SECONDS = 60.0
# HiGHS may overstep a constraint by this much, relative to the budget; it is held back twice as far.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Constraints:
    """What a user demands beside the budget. Patterns are regular expressions, searched in tensor names.

    Attributes:
        pins: pattern -> the type its tensors must have; the first pattern that matches counts.
        floors: pattern -> the least bits a weight its tensors may have.
        uniform: patterns whose groups name a unit: tensors with equal groups get one type
            (`^blk\\.(\\d+)\\.attn_[qkv]` binds q, k and v of each layer). The first that matches counts.
    """

    pins: Mapping[str, GGMLQuantizationType] = field(default_factory=dict)
    floors: Mapping[str, float] = field(default_factory=dict)
    uniform: Sequence[str] = ()

    def pin_of(self, tensor: str) -> GGMLQuantizationType | None:
        """The type a tensor must have, None where it is free. Raises InputError: a pattern is no regular expression."""
        return next((qtype for pattern, qtype in self.pins.items() if _search(pattern, tensor)), None)

    def pins_of(self, tensors: Iterable[str]) -> dict[str, GGMLQuantizationType]:
        """`pin_of` every tensor that has one."""
        found = ((tensor, self.pin_of(tensor)) for tensor in tensors)
        return {tensor: qtype for tensor, qtype in found if qtype is not None}


@dataclass(frozen=True)
class Assignment:
    """A type for each tensor.

    Attributes:
        n_bytes, error: totals over the table's rows that were chosen.
        gap: no assignment within the budget, less two bytes in a million, has an error below `error * (1 - gap)`.
    """

    types: dict[str, GGMLQuantizationType]
    n_bytes: int
    error: float
    gap: float


class BudgetError(InputError):
    """The budget is below the least that the tensors can take; `least` and `most` are bytes."""

    def __init__(self, budget: int, least: int, most: int) -> None:
        super().__init__(
            f"budget: got {budget:,} bytes, expected {least:,} (the least possible) to {most:,} (the most)"
        )
        self.least, self.most = least, most


@dataclass(frozen=True)
class _Option:
    """One type for one unit of tensors."""

    qtype: GGMLQuantizationType
    n_bytes: int
    error: float


def solve(
    table: ErrorTable, budget: int, constraints: Constraints | None = None, pins: Pins | None = None
) -> Assignment:
    """The assignment of least total error whose tensors take at most `budget` bytes.

    Args:
        pins: what the constraints' pins become, by tensor; None: as they are.

    Raises:
        BudgetError: the budget is below the least possible.
        InputError: no type is left for a tensor, or a pattern is not a regular expression or matches no tensor.
    """
    units, options = _demanded(table, budget, constraints or Constraints(), pins)
    chosen, gap = _choose(options, budget)
    types = {tensor: option.qtype for tensors, option in zip(units, chosen, strict=True) for tensor in tensors}
    return Assignment(types, sum(o.n_bytes for o in chosen), float(sum(o.error for o in chosen)), gap)


def check_demands(
    table: ErrorTable, budget: int, constraints: Constraints | None = None, pins: Pins | None = None
) -> None:
    """Raise what `solve` would raise, without solving: only sizes count, so any errors do that fall with the size."""
    _demanded(table, budget, constraints or Constraints(), pins)


def _demanded(
    table: ErrorTable, budget: int, constraints: Constraints, pins: Pins | None
) -> tuple[list[list[str]], list[list[_Option]]]:
    """Units of tensors, and the options of each."""
    _check_patterns(table, constraints)
    if pins is None:
        pins = constraints.pins_of(table.by_tensor)
    units = list(_units(table, constraints).values())
    options = [_undominated(_options(table, tensors, constraints, pins)) for tensors in units]
    least = sum(choices[0].n_bytes for choices in options)
    if budget < least:
        raise BudgetError(budget, least, sum(choices[-1].n_bytes for choices in options))
    return units, options


def _check_patterns(table: ErrorTable, constraints: Constraints) -> None:
    for pattern in (*constraints.pins, *constraints.floors, *constraints.uniform):
        if not any(_search(pattern, tensor) for tensor in table.by_tensor):
            raise InputError(f"pattern {pattern}: matches no tensor")


def _search(pattern: str, tensor: str) -> re.Match[str] | None:
    try:
        return re.search(pattern, tensor)
    except re.error as error:
        raise InputError(f"pattern {pattern}: not a regular expression: {error}") from error


def _units(table: ErrorTable, constraints: Constraints) -> dict[object, list[str]]:
    """Tensors that must share a type, by what binds them."""
    units: dict[object, list[str]] = {}
    for tensor in table.by_tensor:
        found = ((index, re.search(pattern, tensor)) for index, pattern in enumerate(constraints.uniform))
        key = next(((index, match.groups()) for index, match in found if match), tensor)
        units.setdefault(key, []).append(tensor)
    return units


def _options(table: ErrorTable, tensors: Sequence[str], constraints: Constraints, pins: Pins) -> list[_Option]:
    allowed = [{row.qtype: row for row in _allowed(table, tensor, constraints, pins)} for tensor in tensors]
    shared = set.intersection(*(set(rows) for rows in allowed))
    if not shared:
        raise InputError(f"tensors {', '.join(tensors)}: no type is allowed for all of them")
    return [
        _Option(qtype, sum(rows[qtype].n_bytes for rows in allowed), sum(rows[qtype].error for rows in allowed))
        for qtype in sorted(shared)
    ]


def _allowed(table: ErrorTable, tensor: str, constraints: Constraints, pins: Pins) -> list[ErrorRow]:
    rows = table.by_tensor[tensor]
    pinned = pins.get(tensor)
    if pinned is not None:
        rows = tuple(row for row in rows if row.qtype == pinned)
        if not rows:
            raise InputError(f"tensor {tensor}: pinned to {pinned.name}, which the error table does not have for it")
        return list(rows)
    floor = max((bits for pattern, bits in constraints.floors.items() if re.search(pattern, tensor)), default=0.0)
    kept = [row for row in rows if bits_per_weight(row.qtype) >= floor]
    if not kept:
        raise InputError(
            f"tensor {tensor}: none of {', '.join(row.qtype.name for row in rows)} has the {floor:g} bits of the floor"
        )
    return kept


def _undominated(options: list[_Option]) -> list[_Option]:
    """Options by rising size and strictly falling error: a larger one that is no better is never chosen."""
    kept: list[_Option] = []
    for option in sorted(options, key=lambda option: (option.n_bytes, option.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def _choose(options: list[list[_Option]], budget: int) -> tuple[list[_Option], float]:
    """One option of each list; the relative gap that HiGHS proves."""
    flat = [option for choices in options for option in choices]
    owner = np.repeat(np.arange(len(options)), [len(choices) for choices in options])
    # Scaled to about 1: bytes of a 31B and errors in nats are ten orders of magnitude apart.
    error_scale = max(max(option.error for option in flat), 1e-30)
    errors = np.array([option.error for option in flat]) / error_scale
    sizes = np.array([option.n_bytes for option in flat]) / budget if budget else np.zeros(len(flat))
    least = [choices[0] for choices in options]
    room = max(1 - 2 * _TOLERANCE, sum(option.n_bytes for option in least) / budget) if budget else 0.0
    one_each = csr_matrix((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(options), len(flat)))
    with native_output_discarded():
        result = milp(
            errors,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None, :], -np.inf, room)],
            options={"mip_rel_gap": RELATIVE_GAP, "time_limit": TIME_LIMIT_SECONDS},
        )
    if result.x is None:
        raise RuntimeError(f"HiGHS: {result.message}")
    best = [int(np.flatnonzero(owner == unit)[np.argmax(result.x[owner == unit])]) for unit in range(len(options))]
    chosen = [flat[index] for index in best]
    if sum(option.n_bytes for option in chosen) > budget:  # only where the least possible is all that fits
        chosen = least
    chosen = _fill(options, chosen, budget)
    error = sum(option.error for option in chosen)
    bound = float(result.mip_dual_bound) * error_scale
    return chosen, max(0.0, 1 - bound / error) if error else 0.0


def _fill(options: list[list[_Option]], chosen: list[_Option], budget: int) -> list[_Option]:
    """Spend what the gap left unspent: the change that saves most error a byte, while one fits."""
    chosen = list(chosen)
    while True:
        room = budget - sum(option.n_bytes for option in chosen)
        rates = [
            ((now.error - other.error) / (other.n_bytes - now.n_bytes), unit, other)
            for unit, now in enumerate(chosen)
            for other in options[unit]
            if now.n_bytes < other.n_bytes <= now.n_bytes + room
        ]
        if not rates:
            return chosen
        _, unit, other = max(rates, key=lambda rate: rate[0])
        chosen[unit] = other
