"""`gguf-mixed prune MODEL.gguf OUT.gguf --drop-map drop.json`"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from gguf_mixed.atomic_file import check_not_read, check_place
from gguf_mixed.commands.output import AsJson
from gguf_mixed.errors import InputError
from gguf_mixed.imatrix import Imatrix
from gguf_mixed.imatrix_gguf import read_imatrix, write_imatrix
from gguf_mixed.prune import Mixture, Prune, is_sliced
from gguf_mixed.prune_writer import write_pruned
from gguf_mixed.quantize import check_output, partial_path, write_and_verify
from gguf_mixed.roles import group_by_role


def command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL.gguf", help="A Gemma 4 mixture, or the first file of a split one.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    drop_map: Annotated[
        Path, typer.Option(metavar="MAP", help="JSON: layer to the experts that go, as many in each layer.")
    ],
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The model's importance matrix, GGUF or .dat: sliced too.")
    ] = None,
    imatrix_output: Annotated[Path | None, typer.Option(metavar="FILE", help="Where it goes, GGUF.")] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Experts a token from now on, as before unless given.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT.gguf and the imatrix output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove experts from a GGUF of any types, and from its imatrix: bytes are copied, nothing is quantized again."""
    mixture = Mixture.read(model)
    prune = Prune(mixture, mixture.retained(drop_map, top_k), top_k)
    source, sliced = _sliced_imatrix(prune, imatrix, imatrix_output)
    if not dry_run:
        _check_imatrix_output(model, output, imatrix, imatrix_output, overwrite)
        check_not_read(output, [drop_map, imatrix])
        check_output(prune, output, overwrite)
        _write(prune, output, sys.stderr.isatty())
        if sliced is not None and imatrix_output is not None:
            write_imatrix(sliced, imatrix_output)
    report = _report(prune, output, source, sliced, imatrix_output, dry_run)
    if prune.inventory.header_only:
        print(f"note: {model.name} is only a header, and so is what comes of it", file=sys.stderr)
    if as_json:
        print(json.dumps(report))
        return
    _print(report)


def _sliced_imatrix(prune: Prune, path: Path | None, output: Path | None) -> tuple[Imatrix | None, Imatrix | None]:
    """The imatrix before and after."""
    if (path is None) != (output is None):
        raise InputError("--imatrix FILE and --imatrix-output FILE go together: the one is read, the other written")
    if path is None:
        return None, None
    source = read_imatrix(path)
    return source, prune.imatrix(source)


def _check_imatrix_output(
    model: Path, output: Path, imatrix: Path | None, imatrix_output: Path | None, overwrite: bool
) -> None:
    if imatrix is None or imatrix_output is None:
        return
    if imatrix_output.resolve() in {path.resolve() for path in (model, output, imatrix)}:
        raise InputError(f"{imatrix_output.name}: --imatrix-output is one of the other files")
    if imatrix_output.exists() and not overwrite:
        raise InputError(f"{imatrix_output.name}: exists: --overwrite")
    check_place(imatrix_output)


def _write(prune: Prune, output: Path, progress: bool) -> None:
    differences = write_and_verify(prune, output, lambda path: write_pruned(prune, path, progress))
    if differences:
        raise InputError(f"{partial_path(output)}: not as planned: {differences[0]}")


def _report(
    prune: Prune, output: Path, source: Imatrix | None, sliced: Imatrix | None, imatrix_output: Path | None, dry: bool
) -> dict[str, Any]:
    before, after = prune.inventory, prune.tensors.values()
    return {
        "model": str(before.path),
        "output": str(output),
        "dry_run": dry,
        "layers": prune.mixture.n_layers,
        "experts": _change(prune.mixture.num_experts, prune.num_experts),
        "top_k": _change(prune.mixture.top_k, prune.top_k_after),
        "parameters": _change(before.n_elements, sum(tensor.n_elements for tensor in after)),
        "tensor_bytes": _change(before.tensor_bytes, sum(tensor.n_bytes for tensor in after)),
        "file_bytes": _change(before.file_bytes, prune.file_bytes),
        "header_only": before.header_only,
        "sliced": [
            {
                "role": group.role,
                "count": len(group.tensors),
                "shape": [list(shape) for shape in group.shapes],
                "bytes": _change(group.n_bytes, sum(prune.tensors[tensor.name].n_bytes for tensor in group.tensors)),
            }
            for group in group_by_role(before)
            if is_sliced(group.tensors[0])
        ],
        "imatrix": None if source is None or sliced is None else _imatrix_report(source, sliced, imatrix_output),
    }


def _imatrix_report(source: Imatrix, sliced: Imatrix, output: Path | None) -> dict[str, Any]:
    changed = sum(sliced.entries[name] is not entry for name, entry in source.entries.items())
    return {"output": str(output), "entries": len(source.entries), "sliced": changed}


def _change(before: int, after: int) -> dict[str, int]:
    return {"before": before, "after": after}


def _print(report: dict[str, Any]) -> None:
    table = Table(title="sliced", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("role", no_wrap=True)
    for heading in ("count", "shape", "before", "after"):
        table.add_column(heading, justify="left" if heading == "shape" else "right", no_wrap=True)
    for item in report["sliced"]:
        shapes = "\n".join("x".join(map(str, shape)) for shape in item["shape"])
        sizes = (decimal(item["bytes"][when]) for when in ("before", "after"))
        table.add_row(item["role"], str(item["count"]), shapes, *sizes)
    Console().print(table)
    experts, top_k, size = (report[key] for key in ("experts", "top_k", "file_bytes"))
    would = " (not written)" if report["dry_run"] else ""
    used = f"top {top_k['after']}" + (f", before {top_k['before']}" if top_k["after"] != top_k["before"] else "")
    print(f"{report['layers']} layers keep {experts['after']} of {experts['before']} experts, {used}")
    tensors = " -> ".join(decimal(report["tensor_bytes"][when]) for when in ("before", "after"))
    print(f"parameters: {report['parameters']['before']:,} -> {report['parameters']['after']:,}, tensors: {tensors}")
    print(f"{report['output']}{would}: {size['before']:,} -> {size['after']:,} bytes")
    if report["imatrix"]:
        found = report["imatrix"]
        print(f"{found['output']}{would}: {found['sliced']} of {found['entries']} entries sliced")
