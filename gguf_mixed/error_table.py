"""What each tensor costs and loses at each type: the table that allocation works on.

One row a (tensor, type). `n_bytes` is exact. `error` is in one unit for the whole table, comparable across
tensors: expected divergence in nats where a sensitivity was measured. Rows say nothing of other tensors:
errors are taken to add up.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from gemma4q_kernels.ggml import GGMLQuantizationType

from gguf_mixed.errors import InputError


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
