"""`gemma4q tune`"""

import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from tqdm import tqdm

from vllm_gemma4q.benchmark.shapes import sizes_of
from vllm_gemma4q.errors import InputError

if TYPE_CHECKING:  # Triton, which is not on every machine
    import torch
    from gemma4q_kernels.int8_scaled_mm.tiles import Row, Tile, TileTable

    from vllm_gemma4q.benchmark.candidates import Band
    from vllm_gemma4q.benchmark.search import Choice, Problem
    from vllm_gemma4q.benchmark.tune import Measured, Tuner

_FOLDER = Path("gemma4q-tiles")


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="31B, 26B-A4B, or a checkpoint folder.  [default: both]")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where tables go.")] = _FOLDER,
    ranks: Annotated[int, typer.Option("-tp", metavar="N", min=1, help="For shapes of one of N ranks.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.001, help="For each timing.")] = 0.03,
) -> None:
    """Time INT8 tiles on this GPU, for Gemma 4's shapes, and write the tile tables that serve them best."""
    sizes = sizes_of(model, ranks)
    device = _gpu()
    import torch
    from gemma4q_kernels.grouped_mm import tiles as grouped_tiles
    from gemma4q_kernels.int8_scaled_mm import tiles
    from gemma4q_kernels.support import architecture

    from vllm_gemma4q.benchmark.candidates import DENSE, EXPERTS

    try:
        arch = architecture(device)
        table, linears = tiles.table(arch)[0], [(shape.n, shape.k) for shape in sizes.linears]
        run = partial(_tune, device, seconds)
        run(output, table, DENSE, linears, False, lambda tuner, planned: tuner.dense(sizes.linears, planned))
        if sizes.experts:
            table = grouped_tiles.table(arch)
            pairs = [((2 * each.width, each.hidden), (each.hidden, each.width)) for each in sizes.experts]
            both = list(dict.fromkeys(size for pair in pairs for size in pair))
            folder = output / "grouped_mm"
            run(folder, table, EXPERTS, both, True, lambda tuner, planned: tuner.experts(sizes.experts, planned))
    except ValueError as error:
        raise InputError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise InputError(
            "tune: the GPU's memory is full: end what else runs on it, or tune with a larger -tp"
        ) from error
    print(f"To use them: export GEMMA4Q_TILES={output.resolve()}")


def _gpu() -> "torch.device":
    """The GPU to tune for.

    Raises:
        InputError: there is none, or no Triton, or Triton interprets kernels.
    """
    import torch
    from gemma4q_kernels.support import triton_interpreted, triton_support

    if not torch.cuda.is_available():
        raise InputError("tune: no GPU: torch sees none, and tiles are timed on the GPU that they are for")
    device = torch.device("cuda", torch.cuda.current_device())
    support = triton_support(device)
    if not support or triton_interpreted():
        raise InputError(f"tune: {support.reason or 'TRITON_INTERPRET is set: kernels would not run on the GPU'}")
    return device


def _tune(
    device: "torch.device",
    seconds: float,
    folder: Path,
    in_use: "TileTable",
    bands: "Sequence[Band]",
    sizes: Sequence[tuple[int, int]],
    grouped: bool,
    measure: "Callable[[Tuner, dict[Problem, list[Choice]]], Measured]",
) -> None:
    """Compile, time, search and write one table."""
    import torch
    import triton
    from gemma4q_kernels.support import architecture

    from vllm_gemma4q.benchmark.compiled import compiled
    from vllm_gemma4q.benchmark.machine import versions
    from vllm_gemma4q.benchmark.tune import Tuner, make_table, write_table

    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    shared_limit = driver.utils.get_device_properties(device.index)["max_shared_mem"]
    name = "experts" if grouped else "linears"
    # Tables count CUs where HIP counts pairs of them; either is right as long as timings and table agree.
    units = torch.cuda.get_device_properties(device).multi_processor_count
    if in_use.architecture == architecture(device):
        units = in_use.compute_units
    with _bar(f"compiling {name}") as bar:

        def is_usable(tile: "Tile") -> bool:
            bar.update()
            code = compiled(tile, target, grouped)
            return code is not None and code.fits(shared_limit)

        tuner = Tuner(device, in_use, units, is_usable, seconds)
        planned = tuner.plan(bands, sizes, amd=target.backend == "hip")
    with _bar(f"timing {name}", sum(map(len, planned.values()))) as bar:
        times = measure(dataclasses.replace(tuner, done=bar.update), planned)
    table = make_table(
        times,
        bands,
        grouped,
        architecture=architecture(device),
        compute_units=units,
        gpu=torch.cuda.get_device_name(device),
        versions=versions(),
    )
    path = write_table(folder, table)
    print(f"{path}: {len(table.rows)} rows, {_gain(times, in_use.rows, table.rows)}")


def _gain(times: "Measured", before: "Sequence[Row]", after: "Sequence[Row]") -> str:
    """How the new rows compare with those in use, where both were timed."""
    from vllm_gemma4q.benchmark.search import slowdowns

    old, new = slowdowns(times, before), slowdowns(times, after)
    both = [old[problem] / new[problem] for problem in old if problem in new]
    if not both:
        return "none of whose problems could run with the table in use"
    return f"{statistics.geometric_mean(both):.2f} times as fast as the table in use, at worst {min(both):.2f} times"


def _bar(description: str, total: int | None = None) -> "tqdm[NoReturn]":
    return tqdm(total=total, desc=description, disable=not sys.stderr.isatty())
