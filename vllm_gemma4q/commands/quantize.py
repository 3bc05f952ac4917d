"""`gemma4q quantize SRC DST --scheme SCHEME [--statistics STATS]`"""

import json
import shlex
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal

from vllm_gemma4q.checkpoint import Checkpoint, open_checkpoint
from vllm_gemma4q.checkpoint.convert import Conversion, convert
from vllm_gemma4q.commands.progress import byte_bar
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.fp8_static import quantize as fp8_static
from vllm_gemma4q.fp8_static.format import Granularity
from vllm_gemma4q.fp8_static.scales import Rule
from vllm_gemma4q.quark_int8 import quantize as quark_int8
from vllm_gemma4q.sizes import parse_size
from vllm_gemma4q.summary import to_table

_DETAILS = ("rules", "fallbacks", "clipped", "underflowed")


class Scheme(StrEnum):
    """What to quantize to."""

    QUARK_INT8 = "quark-int8"
    FP8_STATIC = "fp8-static"


def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="BF16 Gemma 4 checkpoint folder.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Output folder: absent, empty, or left unfinished.")],
    scheme: Annotated[
        Scheme,
        typer.Option(
            help="quark-int8: W8A8, per-channel weights, per-token activations. "
            "fp8-static: E4M3, scales from --statistics."
        ),
    ],
    statistics: Annotated[
        Path | None, typer.Option(metavar="STATS", help="fp8-static: what gemma4q calibrate wrote for SRC.")
    ] = None,
    activation_scale: Annotated[
        Rule | None, typer.Option(help="fp8-static: how input scales follow from the statistics.  [default: absmax]")
    ] = None,
    weight_scale: Annotated[
        Rule | None, typer.Option(help="fp8-static: how weight scales are chosen.  [default: absmax]")
    ] = None,
    weights: Annotated[
        Granularity | None,
        typer.Option(help="fp8-static: what shares a weight scale; MoE: per-tensor only.  [default: per-tensor]"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest output file, such as 5GB, 500MB or 2GiB.")
    ] = "5GB",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Quantize a checkpoint file to file, a few rows in memory at a time. Run it again to resume."""
    source_checkpoint, max_bytes = open_checkpoint(source), parse_size(max_shard_size)
    if scheme is Scheme.QUARK_INT8:
        given = {
            "--statistics": statistics,
            "--activation-scale": activation_scale,
            "--weight-scale": weight_scale,
            "--weights": weights,
        }
        _refuse(scheme, given)
        conversion = quark_int8.plan(source_checkpoint, max_bytes)
    else:
        options = fp8_static.Options(
            activation_scale or Rule.ABSMAX, weight_scale or Rule.ABSMAX, weights or Granularity.TENSOR
        )
        conversion = _plan_fp8(source_checkpoint, statistics, options, max_bytes)
    written = False
    if not dry_run:
        with byte_bar(conversion.source_bytes, scheme.value) as bar:
            written = convert(conversion, target, ["gemma4q", *sys.argv[1:]], bar.update)
    report = _report(conversion, target)
    if as_json:
        print(json.dumps({**report, "written": written}))
        return
    _print(report)
    if dry_run:
        print("Nothing was written (--dry-run).")
    elif written:
        print(f"Wrote {target}. Serve it: vllm serve {shlex.quote(str(target))}")
    else:
        print(f"{target} is already complete: nothing to do.")


def _plan_fp8(
    source: Checkpoint, statistics: Path | None, options: fp8_static.Options, max_shard_bytes: int
) -> Conversion:
    if statistics is None:
        raise InputError("--scheme fp8-static: --statistics is missing, expected what gemma4q calibrate wrote")
    with byte_bar(fp8_static.bytes_to_measure(source, options), "weight scales") as bar:
        return fp8_static.plan(source, statistics, options, bar.update, max_shard_bytes)


def _refuse(scheme: Scheme, options: Mapping[str, object]) -> None:
    """Options of other schemes do nothing here, and nobody should think they did."""
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name}: got {value}, expected nothing: --scheme {scheme.value} does not use it")


def _report(conversion: Conversion, target: Path) -> dict[str, Any]:
    return {
        "scheme": conversion.scheme,
        "source": str(conversion.source.folder),
        "target": str(target),
        "shards": len(conversion.shards),
        "source_bytes": sum(path.stat().st_size for path in conversion.source.shards),
        "output_bytes": conversion.output_bytes,
        "roles": conversion.summary,
        **{key: conversion.details[key] for key in _DETAILS if key in conversion.details},
    }


def _print(report: dict[str, Any]) -> None:
    Console().print(to_table(report["roles"], title=f"{report['source']} -> {report['scheme']}"))
    before, after = report["source_bytes"], report["output_bytes"]
    print(f"{decimal(before)} -> {decimal(after)} ({after / before:.1%}) in {report['shards']} file(s)")
    if "rules" in report:
        print(f"Weights: {report['clipped']:,} clipped, {report['underflowed']:,} underflowed to zero.")
    for reason, modules in report.get("fallbacks", {}).items():
        print(f"Input scale of {len(modules)} linear(s), such as {modules[0]}: {reason}")
