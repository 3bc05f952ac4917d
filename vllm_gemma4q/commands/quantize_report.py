"""What `gemma4q quantize` says of a plan, and of a finished run: as JSON and for a terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from vllm_gemma4q.checkpoint.convert import Conversion
from vllm_gemma4q.checkpoint.header import read_json
from vllm_gemma4q.checkpoint.run import MANIFEST
from vllm_gemma4q.summary import to_table

_DETAILS = ("rules", "fallbacks", "clipped", "underflowed", "quantization", "bits")


def report(conversion: Conversion, target: Path, complete: bool) -> dict[str, Any]:
    """JSON values.

    Args:
        complete: the target is, and its manifest knows what was found on the way.
    """
    details = conversion.details
    if complete and conversion.conclude is not None:
        details = read_json(target / MANIFEST)["details"]
    return {
        "scheme": conversion.scheme,
        "source": str(conversion.source.folder),
        "target": str(target),
        "shards": len(conversion.shards),
        "source_bytes": sum(path.stat().st_size for path in conversion.source.shards),
        "output_bytes": conversion.output_bytes,
        "roles": conversion.summary,
        **{key: details[key] for key in _DETAILS if key in details},
    }


def print_report(report: Mapping[str, Any]) -> None:
    """The same for people."""
    Console().print(to_table(report["roles"], title=f"{report['source']} -> {report['scheme']}"))
    if "bits" in report:
        Console().print(_bits_table(report["bits"]))
    before, after = report["source_bytes"], report["output_bytes"]
    print(f"{decimal(before)} -> {decimal(after)} ({after / before:.1%}) in {report['shards']} file(s)")
    if "rules" in report:
        print(f"Weights: {report['clipped']:,} clipped, {report['underflowed']:,} underflowed to zero.")
    for reason, modules in report.get("fallbacks", {}).items():
        print(f"Input scale of {len(modules)} linear(s), such as {modules[0]}: {reason}")


def _bits_table(roles: Mapping[str, Mapping[str, Any]]) -> Table:
    """EXL3: bits and errors by role; errors once they are known."""
    table = Table(title="quantized linears")
    table.add_column("role")
    for column in ("linears", "size", "bits/weight", "NMSE", "of outputs"):
        table.add_column(column, justify="right")
    for role, row in roles.items():
        counts = ", ".join(f"K={bits}: {count}" for bits, count in row["linears"].items())
        errors = [f"{row[key]:.5f}" if key in row else "" for key in ("nmse", "proxy")]
        table.add_row(role, counts, decimal(row["bytes"]), f"{row['bpw']:.3f}", *errors)
    return table
