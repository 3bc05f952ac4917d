"""Parts summed up: cells of layers x modules, what is outside of the layers, and roles.

A cell of experts holds hundreds of parts; of their errors it keeps the least, the median and the largest.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from vllm_gemma4q.architecture import Role
from vllm_gemma4q.report.parts import Column, Part

Errors = Mapping[str, Sequence[float]]  # by name of a part; one for each of its matrices
Notes = Mapping[str, Mapping[str, float]]  # by name of a part, by what was counted
SATURATED = "largest share of inputs beyond their scale"
COUNTERS = ("parameters", "quantized", "bytes_before", "bytes_after")
_FEW = 3


@dataclass(frozen=True)
class Spread:
    """Relative squared errors of a cell's matrices, ||W_hat - W||^2 / ||W||^2; infinite where that is no number."""

    count: int
    least: float
    median: float
    largest: float


@dataclass(frozen=True)
class Cell:
    """Parts that stand in one place.

    Attributes:
        label: `q of layer 3`, or the role where it is outside of the layers.
        names: of the first few parts.
        count: of all parts.
        dtypes, shapes, scales: how often each.
        quantized: parameters that are.
        errors: None where none is known.
        notes: what the quantizer counted, summed over the parts; of shares, the largest.
    """

    label: str
    names: tuple[str, ...]
    count: int
    dtypes: Mapping[str, int]
    shapes: Mapping[str, int]
    scales: Mapping[str, int]
    parameters: int
    quantized: int
    n_bytes: int
    errors: Spread | None = None
    notes: Mapping[str, float] = field(default_factory=dict)

    @property
    def bits(self) -> float | None:
        """Bits stored a weight, scales and padding included; None for a cell without weights."""
        return 8 * self.n_bytes / self.parameters if self.parameters else None


@dataclass(frozen=True)
class Grid:
    """Layers x modules.

    Attributes:
        layer_types: kind of attention of each layer, empty text where it is not known.
        columns: kinds of modules that any layer has, in order.
        cells: by layer and kind; a layer without such a module has none.
        outside: embeddings, output layer, towers and the like, by role.
    """

    layer_types: tuple[str, ...]
    columns: tuple[Column, ...]
    cells: Mapping[tuple[int, Column], Cell]
    outside: Mapping[Role, Cell]


@dataclass(frozen=True)
class RoleRow:
    """What all parts of one role take.

    Attributes:
        bytes_before: the manifest's, else two bytes a parameter.
    """

    role: str
    parameters: int
    quantized: int
    bytes_before: int
    bytes_after: int


def make_grid(parts: Sequence[Part], layer_types: Sequence[str], errors: Errors, notes: Notes) -> Grid:
    """Sort parts into cells. Layers that only the file knows have no type."""
    inside: dict[tuple[int, Column], list[Part]] = {}
    outside: dict[Role, list[Part]] = {}
    for part in parts:
        if part.layer is None or part.column is None:
            outside.setdefault(part.role, []).append(part)
        else:
            inside.setdefault((part.layer, part.column), []).append(part)
    n_layers = max([len(layer_types), *(layer + 1 for layer, _ in inside)])
    present = {column for _, column in inside}
    return Grid(
        layer_types=(*layer_types, *("",) * (n_layers - len(layer_types))),
        columns=tuple(column for column in Column if column in present),
        cells={key: make_cell(f"{key[1]} of layer {key[0]}", found, errors, notes) for key, found in inside.items()},
        outside={
            role: make_cell("final norm" if role is Role.NORM else _words(role), outside[role], errors, notes)
            for role in Role
            if role in outside
        },
    )


def make_cell(label: str, parts: Sequence[Part], errors: Errors, notes: Notes) -> Cell:
    """One place's parts, of which there is at least one."""
    found = sorted(_ordered(error) for part in parts for error in errors.get(part.name, ()))
    counted: defaultdict[str, float] = defaultdict(float)
    for part in parts:
        for words, value in notes.get(part.name, {}).items():
            counted[words] = max(counted[words], value) if words == SATURATED else counted[words] + value
    return Cell(
        label=label,
        names=tuple(part.name for part in parts[:_FEW]),
        count=len(parts),
        dtypes=Counter(part.dtype for part in parts),
        shapes=Counter(str(list(part.shape)) for part in parts),
        scales=Counter(scale for part in parts for scale in part.scales),
        parameters=sum(part.parameters for part in parts),
        quantized=sum(part.parameters for part in parts if part.is_quantized),
        n_bytes=sum(part.n_bytes for part in parts),
        errors=Spread(len(found), found[0], median(found), found[-1]) if found else None,
        notes=dict(counted),
    )


def _ordered(error: float) -> float:
    """An error; infinite, and so the largest, where a NaN among weights or scales has made it no number."""
    return error if math.isfinite(error) else math.inf


def by_role(parts: Iterable[Part], before: Mapping[str, int]) -> list[RoleRow]:
    """One row a role, in the order of `Role`, then the total.

    Args:
        before: bytes of the original by role; a role that is not in it counts as BF16.
    """
    found: dict[Role, list[Part]] = {}
    for part in parts:
        found.setdefault(part.role, []).append(part)
    rows = [_role_row(role, found[role], before) for role in Role if role in found]
    return [*rows, RoleRow("total", *(sum(getattr(row, key) for row in rows) for key in COUNTERS))]


def _role_row(role: Role, parts: Sequence[Part], before: Mapping[str, int]) -> RoleRow:
    parameters = sum(part.parameters for part in parts)
    return RoleRow(
        role=_words(role),
        parameters=parameters,
        quantized=sum(part.parameters for part in parts if part.is_quantized),
        bytes_before=before.get(role.value, 2 * parameters),
        bytes_after=sum(part.n_bytes for part in parts),
    )


def _words(role: Role) -> str:
    return role.value.replace("_", " ")
