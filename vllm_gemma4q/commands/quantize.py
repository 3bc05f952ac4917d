"""`gemma4q quantize SRC DST --scheme SCHEME`"""

import json
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from tqdm import tqdm

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import Conversion, convert
from vllm_gemma4q.quark_int8 import quantize as quark_int8
from vllm_gemma4q.sizes import parse_size
from vllm_gemma4q.summary import to_table


class Scheme(StrEnum):
    """What to quantize to."""

    QUARK_INT8 = "quark-int8"


def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="BF16 Gemma 4 checkpoint folder.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Output folder: absent, empty, or left unfinished.")],
    scheme: Annotated[Scheme, typer.Option(help="quark-int8: W8A8, per-channel weights, per-token activations.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest output file, such as 5GB, 500MB or 2GiB.")
    ] = "5GB",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Quantize a checkpoint file to file, a few rows in memory at a time. Run it again to resume."""
    conversion = quark_int8.plan(open_checkpoint(source), parse_size(max_shard_size))
    written = False
    if not dry_run:
        with tqdm(
            total=conversion.source_bytes,
            unit="B",
            unit_scale=True,
            desc=f"{scheme.value}",
            disable=not sys.stderr.isatty(),
        ) as bar:
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


def _report(conversion: Conversion, target: Path) -> dict[str, Any]:
    return {
        "scheme": conversion.scheme,
        "source": str(conversion.source.folder),
        "target": str(target),
        "shards": len(conversion.shards),
        "source_bytes": sum(path.stat().st_size for path in conversion.source.shards),
        "output_bytes": conversion.output_bytes,
        "roles": conversion.summary,
    }


def _print(report: dict[str, Any]) -> None:
    Console().print(to_table(report["roles"], title=f"{report['source']} -> {report['scheme']}"))
    before, after = report["source_bytes"], report["output_bytes"]
    print(f"{decimal(before)} -> {decimal(after)} ({after / before:.1%}) in {report['shards']} file(s)")
