"""From a budget to a choice: the solver's least total error within a size of the file or bits a weight.

The solver knows only the quantizable tensors' bytes; here the header, kept tensors and alignment are taken off first.
Not done: measuring the error table.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gguf_mixed.error_table import ErrorRow, ErrorTable, Pins
from gguf_mixed.errors import InputError
from gguf_mixed.file_size import header_bytes, metadata_changes
from gguf_mixed.header import pad
from gguf_mixed.recipes.base import Choice, Material, quantizable
from gguf_mixed.solver import BudgetError, Constraints, check_demands, solve
from gguf_mixed.tensors import Inventory

ALIGNMENT = 32
MOST_BPW = 64  # that of the widest number format


@dataclass(frozen=True)
class Budget:
    """How large the result may be: bits a weight over all tensors without the header, or bytes of the whole file."""

    bpw: float | None = None
    file_bytes: int | None = None

    def __post_init__(self) -> None:
        if (self.bpw is None) == (self.file_bytes is None):
            raise InputError("budget: expected either bits a weight or a size, and not both")
        if self.bpw is not None and not 0 < self.bpw <= MOST_BPW:
            raise InputError(f"budget: got {self.bpw} bits a weight, expected more than 0 and at most {MOST_BPW}")

    def __str__(self) -> str:
        return f"{self.bpw:.6g} bpw" if self.bpw is not None else f"a file of {self.file_bytes:,} bytes"

    def bpw_of(self, inventory: Inventory) -> float:
        """Bits a weight; of a file's size, with the header counted in."""
        return self.bpw if self.bpw is not None else 8 * (self.file_bytes or 0) / inventory.n_elements

    def of_tensors(self, material: Material, table: ErrorTable) -> int:
        """Bytes left for quantizable tensors; may be negative, which `solve` refuses.

        In a file, alignment is counted at each tensor's worst over the table's types; where rows are multiples of 256
        it is nothing.
        """
        if self.bpw is not None:
            return int(self.bpw * material.inventory.n_elements / 8) - _kept_bytes(material)
        assert self.file_bytes is not None
        return self.file_bytes - _overhead(material, table)

    def holding(self, n_bytes: int, material: Material, table: ErrorTable) -> "Budget":
        """The least budget of this kind with `n_bytes` for quantizable tensors; of bits, in thousandths."""
        if self.bpw is not None:
            thousandths = math.ceil(8000 * (n_bytes + _kept_bytes(material)) / material.inventory.n_elements)
            found = Budget(bpw=thousandths / 1000)
            enough = found.of_tensors(material, table) >= n_bytes  # not where a product was rounded down
            return found if enough else Budget(bpw=(thousandths + 1) / 1000)
        return Budget(file_bytes=n_bytes + _overhead(material, table))


def optimal(material: Material, table: ErrorTable, budget: Budget, constraints: Constraints | None = None) -> Choice:
    """The types of least total error.

    Args:
        table: of every quantizable tensor; types that need imatrix data which is not there are left out.

    Raises:
        InputError: the table is of another model, the budget is impossible (says the least and most), or see `solve`.
    """
    usable = _usable(material, table)
    pins = (constraints or Constraints()).pins_of(usable.by_tensor)
    with _in_terms_of(budget, material, usable):
        found = solve(usable, budget.of_tensors(material, usable), constraints, _written(material, pins))
    errors = {row.tensor: row.error for row in usable if found.types[row.tensor] is row.qtype}
    return Choice({**found.types, **pins}, {"budget": str(budget), "gap": found.gap}, errors)


def check_feasible(
    material: Material, table: ErrorTable, budget: Budget, constraints: Constraints | None = None
) -> None:
    """Raise what `optimal` would raise, without solving: only the table's sizes count, so its errors may be guessed."""
    usable = _usable(material, table)
    pins = (constraints or Constraints()).pins_of(usable.by_tensor)
    with _in_terms_of(budget, material, usable):
        check_demands(usable, budget.of_tensors(material, usable), constraints, _written(material, pins))


@contextmanager
def _in_terms_of(budget: Budget, material: Material, table: ErrorTable) -> Iterator[None]:
    try:
        yield
    except BudgetError as error:
        least, most = (budget.holding(size, material, table) for size in (error.least, error.most))
        raise InputError(f"budget: got {budget}, expected {least} (the least possible) to {most} (the most)") from error


def _written(material: Material, pins: Pins) -> Pins:
    """What llama-quantize writes in the place of types that are asked for, where rows do not fit them."""
    return {name: material.inventory.tensors[name].written_type(qtype) for name, qtype in pins.items()}


def _kept_bytes(material: Material) -> int:
    return sum(tensor.n_bytes for tensor in material.inventory.tensors.values() if tensor.kept_because)


def _overhead(material: Material, table: ErrorTable) -> int:
    inventory = material.inventory
    changes = metadata_changes(material.imatrix, str(material.imatrix_path or ""))
    kept = sum(pad(tensor.n_bytes, ALIGNMENT) for tensor in inventory.tensors.values() if tensor.kept_because)
    padding = sum(max(-row.n_bytes % ALIGNMENT for row in rows) for rows in table.by_tensor.values())
    return header_bytes(inventory, changes) + kept + padding


def _usable(material: Material, table: ErrorTable) -> ErrorTable:
    """The rows that llama-quantize can write as they are, for exactly the model's quantizable tensors."""
    tensors = {tensor.name: tensor for tensor in quantizable(material.inventory)}
    entries = material.imatrix.entries if material.imatrix else {}
    if set(tensors) != set(table.by_tensor):
        name = min(set(tensors) ^ set(table.by_tensor))
        where = "the model" if name in tensors else "the error table"
        raise InputError(f"error table is of another model: tensor {name} is only in {where}")

    def usable(row: ErrorRow) -> bool:
        tensor = tensors[row.tensor]
        if row.qtype not in tensor.legal_types or row.n_bytes != tensor.bytes_as(row.qtype):
            raise InputError(f"error table is of another model: tensor {row.tensor}: {row.qtype.name} does not fit it")
        return row.tensor in entries or not tensor.requires_imatrix(row.qtype)

    return ErrorTable(row for row in table if usable(row))
