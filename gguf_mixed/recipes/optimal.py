"""From a budget to a choice: the solver's least total error within a size of the file or bits a weight.

The solver knows only the quantizable tensors' bytes; here the header, kept tensors and alignment are taken off first.
Not done: measuring the error table.
"""

from gguf_mixed.error_table import ErrorRow, ErrorTable
from gguf_mixed.errors import InputError
from gguf_mixed.file_size import header_bytes, metadata_changes
from gguf_mixed.header import pad
from gguf_mixed.recipes.base import Choice, Material, quantizable
from gguf_mixed.solver import Constraints, solve

ALIGNMENT = 32


def optimal(material: Material, table: ErrorTable, budget: int, constraints: Constraints | None = None) -> Choice:
    """The types of least total error.

    Args:
        table: of every quantizable tensor; types that need imatrix data which is not there are left out.
        budget: bytes of all quantizable tensors, see `budget_of_file` and `budget_of_bpw`.

    Raises:
        InputError: the table is of another model, or see `solve`.
    """
    found = solve(_usable(material, table), budget, constraints)
    return Choice(found.types, {"budget": budget, "n_bytes": found.n_bytes, "error": found.error, "gap": found.gap})


def budget_of_file(material: Material, table: ErrorTable, file_bytes: int) -> int:
    """Bytes left for quantizable tensors in a file of `file_bytes`; may be negative, which `solve` refuses.

    Alignment is counted at each tensor's worst over the table's types; where rows are multiples of 256 it is nothing.
    """
    inventory = material.inventory
    changes = metadata_changes(material.imatrix, str(material.imatrix_path or ""))
    kept = sum(pad(tensor.n_bytes, ALIGNMENT) for tensor in inventory.tensors.values() if tensor.kept_because)
    padding = sum(max(-row.n_bytes % ALIGNMENT for row in rows) for rows in table.by_tensor.values())
    return file_bytes - header_bytes(inventory, changes) - kept - padding


def budget_of_bpw(material: Material, bpw: float) -> int:
    """Bytes left for quantizable tensors at `bpw` bits a weight over all tensors, the header not counted."""
    inventory = material.inventory
    kept = sum(tensor.n_bytes for tensor in inventory.tensors.values() if tensor.kept_because)
    return int(bpw * inventory.n_elements / 8) - kept


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
