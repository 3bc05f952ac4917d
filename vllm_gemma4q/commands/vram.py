"""`gemma4q vram CKPT|MODEL`"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gguf_mixed.commands.output import AsJson
from gguf_mixed.sweep_plot import require_matplotlib
from vllm_gemma4q.benchmark.shapes import MODELS
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.sizes import parse_size
from vllm_gemma4q.vram.engines import GIB, NOT_MEASURED, VLLM, Engine, KvDtype, Request, default_engines, parse_engine
from vllm_gemma4q.vram.planned import UNQUANTIZED_BITS, Scheme
from vllm_gemma4q.vram.plot import context_label, plot_rows
from vllm_gemma4q.vram.source import Source, open_source, plan_source
from vllm_gemma4q.vram.table import Row, contexts_of, report, rows_of

_DEFAULT_HEAD_BITS = "6"
_LEAST_BITS, _MOST_BITS = 1, 8
_WIDTH = 160  # of the table where the output is no terminal


def command(
    model: Annotated[
        str, typer.Argument(metavar="CKPT|MODEL", help="Checkpoint folder, .gguf file, or 31B or 26B-A4B.")
    ],
    context: Annotated[
        str | None, typer.Option(metavar="T,..", help="Tokens of the request, such as 2K,32K.  [default: 2K to 256K]")
    ] = None,
    kv_dtype: Annotated[KvDtype, typer.Option(help="Type of the KV cache.")] = KvDtype.AUTO,
    ranks: Annotated[int, typer.Option("-tp", metavar="N", min=1, help="Tensor parallelism: sizes of one of N.")] = 1,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENGINE",
            help="vllm, vllm==VERSION, exllamav3 or llama.cpp. Repeatable; vLLM is always shown beside where it loads "
            "the format.  [default: those that load it]",
        ),
    ] = None,
    in_flight: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Tokens in flight (vLLM) or micro-batch (llama.cpp).  [default: the engine's]"
        ),
    ] = None,
    scheme: Annotated[Scheme | None, typer.Option(help="Planned format of a named MODEL.  [default: bf16]")] = None,
    bits: Annotated[
        str | None, typer.Option(metavar="B,..", help="Planned EXL3 bits a weight, such as 3.5,4,5,6,8.")
    ] = None,
    head_bits: Annotated[
        str | None,
        typer.Option(
            metavar="B,..", help="Of the output layer, one or as many as --bits; 16: the embedding.  [default: 6]"
        ),
    ] = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of one GPU, such as 24GiB: adds the longest context.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(metavar="SHARE", help="Of --vram that vLLM may use, as in vllm serve.")
    ] = 0.92,
    overhead: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Activations, graphs and workspace as you measured them.")
    ] = None,
    swa_full: Annotated[bool, typer.Option("--swa-full", help="llama.cpp's option of that name.")] = False,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a PNG of the table too.")] = None,
) -> None:
    """GPU memory for one request, by engine and version, KV cache type, context, and tensor parallelism."""
    if not 0 < gpu_memory_utilization <= 1:
        raise InputError(f"--gpu-memory-utilization {gpu_memory_utilization:g}: expected more than 0 and at most 1")
    if plot is not None:
        require_matplotlib()
    request = Request(
        kv_dtype=kv_dtype,
        ranks=ranks,
        in_flight=in_flight,
        gpu_bytes=None if vram is None else parse_size(vram),
        overhead=None if overhead is None else parse_size(overhead),
        swa_full=swa_full,
    )
    sources = _sources(model, scheme, bits, head_bits)
    contexts = contexts_of(context, sources[0].longest)
    rows = rows_of(sources, _engines(engine, sources[0], kv_dtype), request, contexts, gpu_memory_utilization)
    if plot is not None:
        plot_rows(plot, model, rows, request.gpu_bytes)
    if as_json:
        print(json.dumps(report(model, rows, request)))
    else:
        _print(model, rows, request, gpu_memory_utilization)


def _sources(model: str, scheme: Scheme | None, bits: str | None, head_bits: str | None) -> list[Source]:
    if model not in MODELS:
        for name, value in (("--scheme", scheme), ("--bits", bits), ("--head-bits", head_bits)):
            if value is not None:
                raise InputError(f"{name} {value}: expected nothing: {model} has a format; {', '.join(MODELS)} do not")
        return [open_source(Path(model))]
    if bits is None:
        if scheme is Scheme.EXL3 or head_bits is not None:
            raise InputError("--scheme exl3: --bits is missing, expected bits a weight such as 3.5")
        return [plan_source(model, scheme or Scheme.BF16)]
    if scheme not in (None, Scheme.EXL3):
        raise InputError(f"--bits {bits}: expected nothing: --scheme {scheme} does not use it")
    body, head = _bits("--bits", bits), _bits("--head-bits", head_bits or _DEFAULT_HEAD_BITS, unquantized=True)
    head = head * len(body) if len(head) == 1 else head
    if len(head) != len(body):
        raise InputError(f"--head-bits {head_bits}: got {len(head)} values, expected 1 or {len(body)}, as --bits")
    return [plan_source(model, Scheme.EXL3, *pair) for pair in zip(body, head, strict=True)]


def _bits(option: str, text: str, unquantized: bool = False) -> list[float]:
    try:
        values = [float(item) for item in text.split(",")]
    except ValueError:
        values = []
    also = (UNQUANTIZED_BITS,) if unquantized else ()
    if not values or not all(_LEAST_BITS <= value <= _MOST_BITS or value in also for value in values):
        words = f" or {UNQUANTIZED_BITS}" if unquantized else ""
        raise InputError(f"{option} {text}: expected numbers from {_LEAST_BITS} to {_MOST_BITS}{words}, such as 3.5,4")
    return values


def _engines(names: Sequence[str] | None, source: Source, kv_dtype: KvDtype) -> list[Engine]:
    if not names:
        return default_engines(source, kv_dtype)
    engines = [parse_engine(name) for name in names]
    if source.architecture is not None and all(engine.name != VLLM for engine in engines):
        engines.append(parse_engine(VLLM))
    return engines


def _print(model: str, rows: Sequence[Row], request: Request, utilization: float) -> None:
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, markup=False)
    each = f", each of {request.ranks} GPUs" if request.ranks > 1 else ""
    console.print(f"{model}{each}: GiB for one request, by its tokens; KV cache {request.kv_dtype}", soft_wrap=True)
    console.print(_cache_table(rows))
    console.print(_total_table(rows))
    for line in _notes(rows, request, utilization):
        console.print(line, soft_wrap=True)


def _cache_table(rows: Sequence[Row]) -> Table:
    table = _table(["KV cache", "in flight"], rows)
    table.add_row("least: windows only", "", *(_gib(size) for size in rows[0].least.values()))
    unique = {(row.engine, row.in_flight, tuple(row.caches.values())): row for row in rows}
    for row in unique.values():
        in_flight = "" if row.in_flight is None else str(row.in_flight)
        table.add_row(row.engine, in_flight, *(_gib(size) for size in row.caches.values()))
    return table


def _total_table(rows: Sequence[Row]) -> Table:
    table = _table(["weights", "engine", "weights", "other"], rows)
    if rows[0].longest is not None:
        table.add_column("longest", justify="right")
    scheme = None
    for row in rows:
        if row.scheme != scheme:
            table.add_section()
        other = row.other_source if row.other is None else _gib(row.other)
        cells = [_gib(sum(row.weights.values())), other, *(_gib(row.total(tokens)) for tokens in row.caches)]
        fits = [] if row.longest is None else [str(row.longest) if row.longest else "none"]
        table.add_row("" if row.scheme == scheme else row.scheme, row.engine, *cells, *fits)
        scheme = row.scheme
    return table


def _table(headings: Sequence[str], rows: Sequence[Row]) -> Table:
    table = Table()
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < 2 and heading != "in flight" else "right")
    for tokens in rows[0].caches:
        table.add_column(context_label(tokens), justify="right")
    return table


def _notes(rows: Sequence[Row], request: Request, utilization: float) -> list[str]:
    sources = {row.other_source for row in rows}
    notes = ["Totals are weights, KV cache and other memory (activations, CUDA graphs, workspace, context)."]
    if NOT_MEASURED in sources:
        notes.append("Where other memory is not measured, totals lack it: take it from the engine's log (--overhead).")
    notes += [f"Other memory of {row.engine}: {row.other_source}." for row in rows if row.other is not None][:1]
    if request.gpu_bytes is not None:
        size = f"{request.gpu_bytes / GIB:g} GiB"
        share = f"{utilization:g} of {size} in vLLM, {size} elsewhere"
        notes.append(f"longest: tokens of one request that fit into {share}; an upper bound where totals lack memory.")
    return notes


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.2f}"
