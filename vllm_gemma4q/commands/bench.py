"""`gemma4q bench`"""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from gguf_mixed.commands.output import AsJson
from vllm_gemma4q.benchmark.shapes import Shape, sizes_of
from vllm_gemma4q.errors import InputError

if TYPE_CHECKING:  # what multiplies, which takes seconds to import
    import torch

    from vllm_gemma4q.benchmark.linear import Row

M_VALUES = {"cpu": (1, 16, 256), "cuda": (1, 16, 256, 1024, 4096)}
_QUICK_SHAPES = (Shape(256, 128, "quick"), Shape(128, 352, "quick"))
_QUICK_M = (1, 16)
_WIDTH = 140  # of the table where the output is no terminal


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="31B, 26B-A4B, or a checkpoint folder.  [default: both]")
    ] = None,
    ranks: Annotated[int, typer.Option("-tp", metavar="N", min=1, help="Shapes of one of N ranks.")] = 1,
    rows: Annotated[
        list[int] | None, typer.Option("-m", metavar="M", min=1, help="Rows of activations. Repeatable.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="For each contender at each shape and M.")] = 0.6,
    on_cpu: Annotated[bool, typer.Option("--cpu", help="Measure the CPU although there is a GPU.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny shapes, in seconds: shows what runs here, not how fast.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Time INT8 linears beside bfloat16 on this device, by Gemma 4's shapes: medians, and ratios to bfloat16."""
    if quick and (model is not None or rows):
        raise InputError("--quick: got also MODEL or -m, expected neither: its shapes are tiny ones of its own")
    shapes = _QUICK_SHAPES if quick else sizes_of(model, ranks).linears
    import torch

    from vllm_gemma4q.benchmark.linear import QUICK, Effort, compare

    device = torch.device("cpu" if on_cpu or not torch.cuda.is_available() else "cuda")
    m_values = tuple(rows or ()) or (_QUICK_M if quick else M_VALUES[device.type])
    effort = QUICK if quick else Effort(seconds)
    with tqdm(total=len(shapes) * len(m_values), desc="bench", disable=not sys.stderr.isatty()) as bar:
        found = list(compare(shapes, m_values, device, effort, done=bar.update))
    if as_json:
        print(json.dumps(report(found, device)))
    else:
        _print(found, device)


def report(found: "list[Row]", device: "torch.device") -> dict[str, Any]:
    """What `--json` prints: the device, versions, and rows with their shape spelled out."""
    from vllm_gemma4q.benchmark.machine import device_facts, versions

    rows = [{**dataclasses.asdict(row.shape), **dataclasses.asdict(row)} for row in found]
    for row in rows:
        del row["shape"]
    return {"device": device_facts(device), "versions": versions(), "rows": rows}


def _print(found: "list[Row]", device: "torch.device") -> None:
    facts = report([], device)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, markup=False)
    for title in ("device", "versions"):
        console.print(", ".join(f"{key} {value}" for key, value in facts[title].items()), soft_wrap=True)
    table = Table("linear", "N x K", "M", "contender")
    for heading in ("us", "GB/s", "TOPS", "x bf16", "error"):
        table.add_column(heading, justify="right")
    labelled: tuple[Shape, int] | None = None
    for row in found:
        if row.reason:
            continue
        problem = (row.shape, row.m)
        if problem != labelled:
            table.add_section()
        labels = ("", "", "") if problem == labelled else (row.shape.name, f"{row.shape.n} x {row.shape.k}", str(row.m))
        table.add_row(*labels, row.contender, *_figures(row))
        labelled = problem
    console.print(table)
    for contender, reason in sorted({(row.contender, row.reason) for row in found if row.reason}):
        console.print(f"not measured: {contender}: {reason}", soft_wrap=True)
    console.print(
        "Medians. INT8 starts from and ends in bfloat16 activations; error: RMS, relative to bfloat16's output.",
        soft_wrap=True,
    )


def _figures(row: "Row") -> tuple[str, ...]:
    assert row.seconds is not None and row.gb_per_s is not None and row.tops is not None and row.error is not None
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    return f"{row.seconds * 1e6:.1f}", f"{row.gb_per_s:.1f}", f"{row.tops:.3f}", ratio, f"{row.error:.4f}"
