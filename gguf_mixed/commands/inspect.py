"""`gguf-mixed inspect MODEL.gguf`"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from gemma4q_kernels.ggml import QUANTIZABLE_TYPES, GGMLQuantizationType, type_name
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from gguf_mixed.commands.output import AsJson
from gguf_mixed.imatrix_gguf import read_imatrix
from gguf_mixed.roles import RoleGroup, group_by_role
from gguf_mixed.tensors import Inventory, read_inventory


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="A model, or the first file of a split one.")],
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Check that this imatrix is of the model and covers it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List tensors by role: size, the types llama-quantize would write, and those it would silently replace."""
    inventory = read_inventory(model)
    groups = group_by_role(inventory)
    without_data = None if imatrix is None else list(read_imatrix(imatrix).matches(inventory))
    if as_json:
        print(json.dumps({**_summary(inventory, without_data), "roles": [_role(group) for group in groups]}))
        return
    console = Console()
    console.print(_role_table(inventory, groups))
    print("\n".join([*_restricted(groups), ""]))
    if any(group.fallbacks for group in groups):
        console.print(_fallback_table(groups))
        print()
    print(_total(inventory))
    if without_data is not None:
        print(f"{imatrix}: of this model; tensors without data: {_some(without_data)}")


def _summary(inventory: Inventory, without_data: list[str] | None) -> dict[str, Any]:
    return {
        "file": str(inventory.path),
        "files": len(inventory.headers),
        "architecture": inventory.architecture,
        "tensors": len(inventory.tensors),
        "parameters": inventory.n_elements,
        "tensor_bytes": inventory.tensor_bytes,
        "file_bytes": inventory.file_bytes,
        "bpw": 8 * inventory.tensor_bytes / inventory.n_elements,
        "header_only": inventory.header_only,
        "already_quantized": inventory.already_quantized,
        "imatrix": None if without_data is None else {"without_data": without_data},
    }


def _role(group: RoleGroup) -> dict[str, Any]:
    return {
        "role": group.role,
        "count": len(group.tensors),
        "row_length": group.row_length,
        "shapes": [list(shape) for shape in group.shapes],
        "types": {type_name(qtype): count for qtype, count in group.types.items()},
        "parameters": group.n_elements,
        "bytes": group.n_bytes,
        "bpw": group.bpw,
        "kept_because": group.kept_because,
        "legal": [type_name(qtype) for qtype in group.legal_types],
        "fallbacks": [
            {
                "requested": type_name(item.requested),
                "written": None if item.written is None else type_name(item.written),
                "bpw": item.bpw,
                "bytes": item.n_bytes,
            }
            for item in group.fallbacks
        ],
    }


def _role_table(inventory: Inventory, groups: tuple[RoleGroup, ...]) -> Table:
    table = _table(f"{inventory.path.name} ({inventory.architecture})")
    for heading in ("count", "shape", "type", "size", "bpw"):
        table.add_column(
            heading, justify="left" if heading in ("shape", "type") else "right", no_wrap=heading != "type"
        )
    table.add_column("can be", overflow="fold")
    for group in groups:
        table.add_row(
            _short(group.role),
            str(len(group.tensors)),
            "\n".join("x".join(map(str, shape)) for shape in group.shapes),
            " ".join(qtype.name for qtype in group.types),
            decimal(group.n_bytes),
            f"{group.bpw:.3f}",
            _legal(group),
        )
    return table


def _legal(group: RoleGroup) -> str:
    if group.kept_because:
        return "kept: 1-D" if group.kept_because == "1-D" else "kept: name"
    return "any type" if len(group.legal_types) == len(QUANTIZABLE_TYPES) else "see below"


def _fallback_table(groups: tuple[RoleGroup, ...]) -> Table:
    table = _table("what llama-quantize writes instead, with a warning on its log only")
    table.add_column("row", justify="right", no_wrap=True)
    table.add_column("asked for", overflow="fold")
    table.add_column("written", no_wrap=True)
    table.add_column("bpw", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for group in groups:
        by_written: dict[GGMLQuantizationType | None, list[GGMLQuantizationType]] = {}
        sizes = {item.written: (item.bpw, item.n_bytes) for item in group.fallbacks}
        for item in group.fallbacks:
            by_written.setdefault(item.written, []).append(item.requested)
        for written, requested in by_written.items():
            bpw, n_bytes = sizes[written]
            table.add_row(
                _short(group.role),
                str(group.row_length),
                _names(requested),
                "it stops" if written is None else written.name,
                "" if bpw is None else f"{bpw:.3f}",
                "" if n_bytes is None else decimal(n_bytes),
            )
    return table


def _table(title: str) -> Table:
    """A table whose first column is the role. Narrow: it must fit the 80 columns that a pipe has."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("role", no_wrap=True)
    return table


def _restricted(groups: tuple[RoleGroup, ...]) -> list[str]:
    """A line for each set of types that is not all, smallest type first."""
    by_types: dict[tuple[GGMLQuantizationType, ...], list[RoleGroup]] = {}
    for group in groups:
        if not group.kept_because and len(group.legal_types) < len(QUANTIZABLE_TYPES):
            by_types.setdefault(tuple(group.legal_types), []).append(group)
    return [
        f"{', '.join(f'{_short(group.role)} ({group.row_length})' for group in found)} can be {_names(types)}"
        for types, found in by_types.items()
    ]


def _short(role: str) -> str:
    return role.removesuffix(".weight")


def _names(types: Sequence[GGMLQuantizationType]) -> str:
    return " ".join(qtype.name for qtype in types)


def _some(names: list[str], most: int = 5) -> str:
    if not names:
        return "none"
    return f"{len(names)} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"


def _total(inventory: Inventory) -> str:
    bpw = 8 * inventory.tensor_bytes / inventory.n_elements
    text = (
        f"{len(inventory.tensors)} tensors, {inventory.n_elements:,} parameters, "
        f"{decimal(inventory.tensor_bytes)}, {bpw:.3f} bpw"
    )
    if inventory.header_only:
        text += "; header only: the file holds no weights"
    if inventory.already_quantized:
        text += "; already quantized: llama-quantize needs --allow-requantize"
    return text
