"""What each tensor costs and loses at each type: the table that allocation works on.

One row a (tensor, type). `n_bytes` is exact. `error` is in one unit for the whole table, comparable across
tensors: expected divergence in nats where a sensitivity was measured. Rows say nothing of other tensors:
errors are taken to add up.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gemma4q_kernels.ggml import FLOAT_TYPES, GGMLQuantizationType

from gguf_mixed.errors import InputError
from gguf_mixed.imatrix import Imatrix
from gguf_mixed.tensors import Inventory, Tensor

Pins = Mapping[str, GGMLQuantizationType]
"""By tensor, a type that it alone may have beside those that all may have."""


@dataclass(frozen=True)
class ErrorRow:
    """One tensor stored as one type."""

    tensor: str
    qtype: GGMLQuantizationType
    n_bytes: int
    error: float


@dataclass(frozen=True)
class ErrorTable:
    """Rows by tensor, in the order in which tensors first appear.

    Raises:
        InputError: a (tensor, type) twice, an error that is negative or not a number, or a size below zero.
    """

    rows: tuple[ErrorRow, ...]
    by_tensor: dict[str, tuple[ErrorRow, ...]] = field(init=False, compare=False)

    def __init__(self, rows: Iterable[ErrorRow]):
        object.__setattr__(self, "rows", tuple(rows))
        grouped: dict[str, list[ErrorRow]] = {}
        seen = set()
        for row in self.rows:
            if (row.tensor, row.qtype) in seen:
                raise InputError(f"tensor {row.tensor}: {row.qtype.name} is in the error table twice")
            if not row.error >= 0 or row.n_bytes < 0:
                raise InputError(
                    f"tensor {row.tensor}: {row.qtype.name}: got error {row.error} and {row.n_bytes} bytes, "
                    "expected neither below 0"
                )
            seen.add((row.tensor, row.qtype))
            grouped.setdefault(row.tensor, []).append(row)
        object.__setattr__(self, "by_tensor", {name: tuple(options) for name, options in grouped.items()})

    def __iter__(self) -> Iterator[ErrorRow]:
        return iter(self.rows)


def check_source(inventory: Inventory, imatrix: Imatrix | None) -> None:
    """Check that a table can be made of this model.

    Raises:
        InputError: a tensor that would be quantized is not of F32, F16 or BF16, or the imatrix is of another model.
    """
    for tensor in inventory.tensors.values():
        if not tensor.kept_because and tensor.qtype not in FLOAT_TYPES:
            raise InputError(f"tensor {tensor.name} is {tensor.qtype.name}, expected F32, F16 or BF16")
    if imatrix is not None:
        imatrix.matches(inventory)


def usable_types(
    tensor: Tensor,
    asked: Sequence[GGMLQuantizationType],
    weighted: bool,
    known: Collection[GGMLQuantizationType],
    pins: Pins | None = None,
) -> tuple[GGMLQuantizationType, ...]:
    """Types that a tensor has rows in a table for, smallest first.

    Args:
        asked: types, each standing for what llama-quantize writes in its place where rows do not fit.
        weighted: whether there is imatrix data for the tensor; types that need it are left out where there is none.
        known: types that an error can be told of.
        pins: see `Pins`.

    Raises:
        InputError: none is left.
    """
    pinned = (pins[tensor.name],) if pins and tensor.name in pins else ()
    types = tuple(
        qtype
        for qtype in tensor.written_for([*asked, *pinned])
        if qtype in known and (weighted or not tensor.requires_imatrix(qtype))
    )
    if not types:
        why = "" if weighted else " without imatrix data"
        raise InputError(
            f"tensor {tensor.name}: none of the types asked for can store rows of {tensor.row_length}{why}"
        )
    return types
