"""`gemma4q quantize SRC DST --scheme SCHEME [--statistics STATS]`"""

import json
import os
import shlex
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from gguf_mixed.commands.output import AsJson
from gguf_mixed.tasks import Executor, Where, executor
from gguf_mixed.tasks import options as scale
from vllm_gemma4q.checkpoint import Checkpoint, open_checkpoint
from vllm_gemma4q.checkpoint.convert import Conversion, convert
from vllm_gemma4q.commands.model import Device
from vllm_gemma4q.commands.progress import byte_bar
from vllm_gemma4q.commands.quantize_report import print_report, report
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.exl3 import quantize as exl3
from vllm_gemma4q.fp8_static import quantize as fp8_static
from vllm_gemma4q.fp8_static.format import Granularity
from vllm_gemma4q.fp8_static.scales import Rule
from vllm_gemma4q.quark_int8 import quantize as quark_int8
from vllm_gemma4q.sizes import parse_size


class Scheme(StrEnum):
    """What to quantize to."""

    QUARK_INT8 = "quark-int8"
    FP8_STATIC = "fp8-static"
    EXL3 = "exl3"


class Codebook(StrEnum):
    """EXL3's."""

    MCG = "mcg"
    MUL1 = "mul1"
    THREE_INST = "3inst"


_FP8, _EXL3 = "Options of fp8-static", "Options of exl3"
_USES = {
    Scheme.QUARK_INT8: frozenset(),
    Scheme.FP8_STATIC: frozenset({"--statistics", "--activation-scale", "--weight-scale", "--weights"}),
    Scheme.EXL3: frozenset({"--statistics", "--no-hessian", "--bits", "--head-bits", "--codebook", "--device"}),
}


def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="BF16 Gemma 4 checkpoint folder.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Output folder: absent, empty, or left unfinished.")],
    scheme: Annotated[
        Scheme,
        typer.Option(
            help="quark-int8: W8A8, per-channel weights, per-token activations. "
            "fp8-static: E4M3, scales from --statistics. exl3: a trellis of 1 to 8 bits, by --statistics with Hessians."
        ),
    ],
    statistics: Annotated[
        Path | None,
        typer.Option(metavar="STATS", help="fp8-static, exl3 (with --hessians): what gemma4q calibrate wrote for SRC."),
    ] = None,
    activation_scale: Annotated[
        Rule | None,
        typer.Option(help="How input scales follow from the statistics.", show_default="absmax", rich_help_panel=_FP8),
    ] = None,
    weight_scale: Annotated[
        Rule | None, typer.Option(help="How weight scales are chosen.", show_default="absmax", rich_help_panel=_FP8)
    ] = None,
    weights: Annotated[
        Granularity | None,
        typer.Option(
            help="What shares a weight scale; MoE: per-tensor only.", show_default="per-tensor", rich_help_panel=_FP8
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(help="Bits a weight in all layers, 1 to 8, such as 3.5.", rich_help_panel=_EXL3),
    ] = None,
    head_bits: Annotated[
        int | None,
        typer.Option(help="Bits a weight of the output layer; 16: leave it.", show_default="6", rich_help_panel=_EXL3),
    ] = None,
    codebook: Annotated[
        Codebook | None, typer.Option(help="What trellis states stand for.", show_default="mcg", rich_help_panel=_EXL3)
    ] = None,
    no_hessian: Annotated[
        bool | None,
        typer.Option(
            "--no-hessian", help="Without --statistics: round every weight for itself.", rich_help_panel=_EXL3
        ),
    ] = None,
    device: Annotated[
        Device | None, typer.Option(help="Where to compute.", show_default="cpu", rich_help_panel=_EXL3)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest output file, such as 5GB, 500MB or 2GiB.")
    ] = "5GB",
    workers: scale.Workers = None,
    ray: scale.Ray = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a checkpoint file to file, a few rows in memory (exl3: a linear). Run it again to resume."""
    if ray is not None:  # other machines have another working directory
        source, target = source.absolute(), target.absolute()
        statistics = None if statistics is None else statistics.absolute()
    checkpoint, max_bytes = open_checkpoint(source), parse_size(max_shard_size)
    given = {
        "--statistics": statistics,
        "--activation-scale": activation_scale,
        "--weight-scale": weight_scale,
        "--weights": weights,
        "--bits": bits,
        "--head-bits": head_bits,
        "--codebook": codebook,
        "--no-hessian": no_hessian,
        "--device": device,
    }
    _refuse_others(scheme, given)
    if scheme is Scheme.EXL3:
        if bits is None:
            raise InputError("--scheme exl3: --bits is missing, expected 1 to 8, such as 3.5")
        require_hessians(statistics, bool(no_hessian))
    devices = visible_devices() if device is not None and device.value != Device.CPU.value else ()
    where = Where(None, None) if dry_run else Where(workers, ray, devices)
    written = False
    with executor(where) as at_work:
        if scheme is Scheme.QUARK_INT8:
            conversion = quark_int8.plan(checkpoint, max_bytes)
        elif scheme is Scheme.FP8_STATIC:
            rules = fp8_static.Options(
                activation_scale or Rule.ABSMAX, weight_scale or Rule.ABSMAX, weights or Granularity.TENSOR
            )
            conversion = _plan_fp8(checkpoint, statistics, rules, max_bytes, at_work)
        else:
            wanted = exl3.Options(
                bits or 0,
                6 if head_bits is None else head_bits,
                (codebook or Codebook.MCG).value,
                (device or Device.CPU).value,
            )
            conversion = exl3.plan(checkpoint, wanted, statistics, max_bytes)
        if not dry_run:
            with byte_bar(conversion.source_bytes, scheme.value) as bar:
                written = convert(conversion, target, ["gemma4q", *sys.argv[1:]], bar.update, workers=at_work)
    found = report(conversion, target, complete=not dry_run)
    if as_json:
        print(json.dumps({**found, "written": written}))
        return
    print_report(found)
    if dry_run:
        print("Nothing was written (--dry-run).")
    elif written:
        print(f"Wrote {target}. Serve it: vllm serve {shlex.quote(str(target))}")
    else:
        print(f"{target} is already complete: nothing to do.")


def _plan_fp8(
    source: Checkpoint,
    statistics: Path | None,
    options: fp8_static.Options,
    max_shard_bytes: int,
    workers: Executor | None,
) -> Conversion:
    if statistics is None:
        raise InputError("--scheme fp8-static: --statistics is missing, expected what gemma4q calibrate wrote")
    with byte_bar(fp8_static.bytes_to_measure(source, options), "weight scales") as bar:
        return fp8_static.plan(source, statistics, options, bar.update, max_shard_bytes, workers)


def visible_devices() -> list[str]:
    """GPUs of this machine that torch may use, by the names that CUDA_VISIBLE_DEVICES has for them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def require_hessians(statistics: Path | None, no_hessian: bool) -> None:
    """Raises InputError unless exactly one of both is given."""
    if no_hessian and statistics is not None:
        raise InputError(f"--no-hessian: got --statistics {statistics} too, expected one of them")
    if statistics is None and not no_hessian:
        raise InputError(
            "--scheme exl3: --statistics is missing, expected what gemma4q calibrate --hessians wrote "
            "(or --no-hessian, which costs quality)"
        )


def _refuse_others(scheme: Scheme, given: Mapping[str, object]) -> None:
    """Options of other schemes do nothing here, and nobody should think they did."""
    for name, value in given.items():
        if value is not None and name not in _USES[scheme]:
            got = "it" if value is True else value
            raise InputError(f"{name}: got {got}, expected nothing: --scheme {scheme.value} does not use it")
