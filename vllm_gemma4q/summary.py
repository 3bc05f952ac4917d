"""What a plan does to a model, in numbers a person reads: parameters and bytes by role, before and after."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from vllm_gemma4q.architecture import Role, role_of
from vllm_gemma4q.checkpoint import DTYPE_BYTES
from vllm_gemma4q.checkpoint.steps import Step

_COUNTERS = ("parameters", "quantized", "bytes_before", "bytes_after")


def summarize(steps: Iterable[Step]) -> dict[str, dict[str, int]]:
    """Counters by role (`Role` values) of what is written, plus `total`; a parameter is quantized unless it is copied.

    Source bytes that two steps read, as an embedding that also becomes the output layer, count for the first one.
    """
    table: dict[str, dict[str, int]] = {}
    read: set[tuple[str, object]] = set()
    for step in steps:
        row = table.setdefault(role_of(next(step.written).name).value, dict.fromkeys(_COUNTERS, 0))
        parameters = step.source_bytes // DTYPE_BYTES[step.source.dtype]
        row["parameters"] += parameters
        row["quantized"] += 0 if step.is_copy else parameters
        row["bytes_before"] += 0 if (step.source.name, step.spans) in read else step.source_bytes
        row["bytes_after"] += step.output_bytes
        read.add((step.source.name, step.spans))
    order = [role.value for role in Role if role.value in table]
    result: dict[str, dict[str, int]] = {role: table[role] for role in order}
    result["total"] = {key: sum(row[key] for row in result.values()) for key in _COUNTERS}
    return result


def quantized_share(row: Mapping[str, Any]) -> float:
    """Fraction of a role's parameters that are quantized, 0 to 1."""
    return row["quantized"] / row["parameters"] if row["parameters"] else 0.0


def to_table(summary: Mapping[str, Mapping[str, int]], title: str) -> Table:
    """A summary as a table for a terminal."""
    table = Table(title=title)
    table.add_column("role")
    for column in ("parameters", "quantized", "before", "after"):
        table.add_column(column, justify="right")
    for role, row in summary.items():
        sizes = [decimal(row[key]) for key in ("bytes_before", "bytes_after")]
        table.add_row(role, f"{row['parameters']:,}", f"{quantized_share(row):.1%}", *sizes)
    return table
