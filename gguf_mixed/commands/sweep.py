"""`gguf-mixed sweep MODEL.gguf FOLDER --imatrix FILE --sensitivity fisher.safetensors [--text FILE]`"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from gguf_mixed.allocation import Measuring, describe_errors, error_table
from gguf_mixed.atomic_file import check_place, exclusive_folder
from gguf_mixed.base_file import Comparison
from gguf_mixed.commands import allocation_options as options
from gguf_mixed.commands import comparison_options as comparing
from gguf_mixed.engine import Engine, find_engine
from gguf_mixed.errors import InputError
from gguf_mixed.identity import file_sha256, model_sha256, named
from gguf_mixed.llama_cpp import find_tool
from gguf_mixed.measure import N_ROWS, Sampling
from gguf_mixed.perplexity import Divergence
from gguf_mixed.recipes import Material
from gguf_mixed.sources import ROLE_PRIOR, find_sensitivity
from gguf_mixed.sweep import Evaluation, pending_tiers, plan_tiers, run_tiers
from gguf_mixed.sweep_plot import plot, require_matplotlib
from gguf_mixed.sweep_results import open_results
from gguf_mixed.sweep_tiers import DEFAULT_BPW, DEFAULT_MIXES, Planner, parse_tiers
from gguf_mixed.tasks import Where
from gguf_mixed.tasks import options as scale

PLOT_NAME = "plot.png"


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="A model, or the first file of a split one.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="For tables, results.json and plot.png.")],
    imatrix: Annotated[Path | None, typer.Option(metavar="FILE", help="The importance matrix, GGUF or .dat.")] = None,
    sensitivity: options.Sensitivity = ROLE_PRIOR,
    bpw: Annotated[
        str | None,
        typer.Option(metavar="LIST", help=f"Of recipe optimal; {', '.join(map(str, DEFAULT_BPW))} where possible."),
    ] = None,
    tiers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Other recipes, and optimal@RECIPE: optimal for the size of that one's file. "
            f"{', '.join(DEFAULT_MIXES)} by default; none: no others.",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write each file and measure it on this; else only predict.")
    ] = None,
    chunks: comparing.Chunks = comparing.DEFAULT_CHUNKS,
    context: comparing.Context = comparing.CONTEXT,
    base: comparing.BaseFile = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the quantized files in FOLDER.")] = False,
    plotted: Annotated[bool, typer.Option("--plot/--no-plot", help="Write plot.png (needs matplotlib).")] = True,
    engine: Annotated[Engine, typer.Option(help="Run llama-quantize, or call ggml's library.")] = Engine.AUTO,
    types: options.Types = None,
    backend: options.Backend = None,
    pin: options.Pin = None,
    floor: options.Floor = None,
    uniform: options.Uniform = None,
    rows: options.Rows = N_ROWS,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    workers: scale.Workers = None,
    ray: scale.Ray = None,
    cache: options.Cache = None,
    force: options.Force = False,
    llama_cpp: comparing.LlamaCpp = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json on stdout.")] = False,
) -> None:
    """Plan a set of sizes from one error table, and measure them; the same command again goes on where it stopped."""
    if plotted:
        require_matplotlib(", or --no-plot")
    if keep and text is None:
        raise InputError("--keep: files are written to be measured: --text FILE")
    chosen = parse_tiers(tiers, bpw)
    if ray is not None:  # other machines have another working directory
        model = model.absolute()
    material = Material.read(model, imatrix, llama_cpp)
    if text is not None and material.inventory.header_only:
        raise InputError(f"{model.name}: holds no weights, only a header: nothing to measure, so no --text")
    constraints = options.parse_constraints(pin, floor, uniform)
    source = find_sensitivity(sensitivity, material.inventory, force)
    allowed = options.parse_types(types, backend)
    inputs = {
        "model": named(model, model_sha256(material.inventory)),
        "imatrix": None if imatrix is None else named(imatrix, file_sha256(imatrix)),
        "sensitivity": _identity_of(sensitivity),
        "types": [qtype.name for qtype in allowed],
        "pin": pin or [],
        "floor": floor or [],
        "uniform": uniform or [],
        "rows": rows,
        "seed": seed,
    }
    evaluation, identity = None, None
    if text is not None:
        comparison = Comparison(find_tool("llama-perplexity", llama_cpp), model, text, chunks, context, threads)
        writing = threads or os.cpu_count() or 1
        evaluation = Evaluation(comparison, find_engine(engine, llama_cpp), base, writing, keep)
        identity = {"text": named(text, file_sha256(text)), "chunks": chunks, "context": context}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror}") from error
    with exclusive_folder(folder):
        results = open_results(folder, inputs, identity)
        pending = pending_tiers(folder, chosen, results, evaluation)
        if pending:
            check_place(results.path)
            if evaluation is not None and base is not None and not base.exists():
                check_place(base)
            if not source.measured:
                _say(f"note: sensitivity is {source.source}, not measured on this model: no divergence is predicted")
            if material.inventory.header_only:
                _say("note: errors of types are a prior: the file holds no weights, only a header")
            here = threads or os.cpu_count() or 1
            how = Measuring(Sampling(rows, seed), here, cache, sys.stderr.isatty(), Where(workers, ray))
            table = error_table(material, source, allowed, how, constraints)
            errors = describe_errors(material.inventory, how.sampling)
            planned = plan_tiers(Planner(material, source, table, errors, constraints), pending, results)
            run_tiers(folder, planned, results, evaluation, _say)
        content = results.content
        drawn = plotted and plot(content, f"{model.name}: size and divergence", folder / PLOT_NAME)
    if as_json:
        print(json.dumps(content))
        return
    _print(folder, content, {tier.name for tier in chosen}, drawn)


def _identity_of(sensitivity: str) -> Any:
    path = Path(sensitivity)
    return named(path, file_sha256(path)) if path.suffix in (".safetensors", ".csv") else sensitivity


def _print(folder: Path, content: dict[str, Any], chosen: set[str], drawn: bool) -> None:
    measured = any(entry["measured"] for entry in content["tiers"])
    table = Table(title=content["inputs"]["model"]["name"], box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("tier", no_wrap=True)
    for heading in ("size", "bpw", "predicted", *(comparing.HEADINGS if measured else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in content["tiers"]:
        predicted = "" if entry["predicted"] is None else f"{entry['predicted']:.4f}"
        cells = comparing.cells(Divergence(**entry["measured"])) if entry["measured"] else ()
        table.add_row(entry["name"], decimal(entry["file_bytes"]), f"{entry['bpw']:.3f}", predicted, *cells)
    Console().print(table)
    for entry in content["tiers"]:
        if entry["not_in_error_table"]:
            print(f"{entry['name']}: not predicted: the error table has no {', '.join(entry['not_in_error_table'])}")
    for name, reason in content["skipped"].items():
        if name in chosen:
            print(f"{name}: left out: {reason}")
    print(f"{folder}: results.json, a table for each tier{f', {PLOT_NAME}' if drawn else ''}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
