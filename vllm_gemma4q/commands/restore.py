"""`gemma4q restore QUANT BASE DST`"""

import json
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from gguf_mixed.commands.output import AsJson
from gguf_mixed.errors import one_line
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.commands.progress import byte_bar
from vllm_gemma4q.restore.plan import Restoration, bytes_to_compare, plan
from vllm_gemma4q.restore.verify import verify
from vllm_gemma4q.sizes import parse_size


def command(
    quantized: Annotated[Path, typer.Argument(metavar="QUANT", help="Quantized Gemma 4 checkpoint folder.")],
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The BF16 checkpoint that it was made from.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Output folder: absent, empty, or left unfinished.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be done and write nothing.")] = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest output file, such as 5GB, 500MB or 2GiB.")
    ] = "5GB",
    as_json: AsJson = False,
) -> None:
    """Take back from BASE what should not have been quantized, drop orphan scales, rewrite the config, verify."""
    source, original, max_bytes = open_checkpoint(quantized), open_checkpoint(base), parse_size(max_shard_size)
    with byte_bar(bytes_to_compare(source, original), "comparing") as bar:
        restoration = plan(source, original, bar.update, max_bytes)
    written = False
    if restoration.is_needed and not dry_run:
        with byte_bar(restoration.conversion.source_bytes, "restore") as bar:
            arguments = ["gemma4q", *sys.argv[1:]]
            written = convert(
                restoration.conversion, target, arguments, bar.update, lambda shards: verify(restoration, shards)
            )
    if as_json:
        print(json.dumps({**_report(restoration, target), "written": written}))
        return
    _print(restoration, every_name=dry_run)
    if not restoration.is_needed:
        print(f"{quantized} is sound: nothing to restore, nothing was written.")
    elif dry_run:
        print("Nothing was written (--dry-run).")
    elif written:
        print(f"Wrote {target}, verified against BASE. Serve it: vllm serve {shlex.quote(str(target))}")
    else:
        print(f"{target} is already complete: nothing to do.")


def _report(restoration: Restoration, target: Path) -> dict[str, Any]:
    conversion = restoration.conversion
    assert conversion.base is not None
    return {
        "source": str(conversion.source.folder),
        "base": str(conversion.base.folder),
        "target": str(target),
        "needed": restoration.is_needed,
        "output_bytes": conversion.output_bytes,
        **conversion.details,
    }


def _print(restoration: Restoration, every_name: bool) -> None:
    """What was found; each name only when nothing is written, for then nothing else tells."""
    lines = [
        *((f"restore ({reason})", name) for name, reason in restoration.restored.items()),
        *(("drop", name) for name in restoration.dropped),
        *(("rename", f"{name} -> {target}") for name, target in restoration.renamed.items()),
        *((f"add to {restoration.form.lists[0]}", name) for name in restoration.list_added),
        *((f"remove from {restoration.form.lists[0]}", name) for name in restoration.list_removed),
    ]
    if every_name:
        for action, name in lines:
            print(one_line(f"{action}: {name}"))
    for action, count in Counter(action for action, _ in lines).items():
        print(f"{action}: {count}")
    print(f"Result: {decimal(restoration.conversion.output_bytes)} in {len(restoration.conversion.shards)} file(s)")
