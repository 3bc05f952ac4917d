"""`gguf-mixed plan MODEL.gguf --recipe NAME -o overrides.txt`"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from gguf_mixed.errors import InputError
from gguf_mixed.imatrix_gguf import read_imatrix
from gguf_mixed.overrides import override_table
from gguf_mixed.quantize import Job
from gguf_mixed.recipes import Material, find_recipe
from gguf_mixed.sidecar import describe, write_plan
from gguf_mixed.tensors import read_inventory

NO_SENSITIVITY = "none: the recipe is a fixed rule"


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="A model, or the first file of a split one.")],
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="rank15, rank15-legacy, cd-q6_k .. cd-q2_k, stock-MIX (stock-q4_k_m), uniform-TYPE (uniform-iq4_xs).",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The override table to write.")],
    imatrix: Annotated[Path | None, typer.Option(metavar="FILE", help="The importance matrix, GGUF or .dat.")] = None,
    llama_cpp: Annotated[Path | None, typer.Option(metavar="DIR", help="Where llama-quantize is (stock-MIX).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the sidecar on stdout.")] = False,
) -> None:
    """Choose a type for every tensor; write the table for llama-quantize, and FILE.json saying where it comes from."""
    inventory = read_inventory(model)
    loaded = None if imatrix is None else read_imatrix(imatrix)
    if loaded is not None:
        loaded.matches(inventory)
    choice = find_recipe(recipe)(Material(inventory, loaded, imatrix, llama_cpp))
    job = Job(inventory, override_table(inventory, choice.types), loaded, imatrix)
    content = describe(job, choice.types, recipe.lower(), choice.details, NO_SENSITIVITY)
    if output.exists() and any(output.samefile(header.path) for header in inventory.headers):
        raise InputError(f"{output.name}: is the model itself")
    try:
        write_plan(output, job.table, content)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror}") from error
    if as_json:
        print(json.dumps(content))
        return
    predicted = content["predicted"]
    print(f"{output}: {len(job.table.types)} tensors, recipe {content['recipe']}")
    print(f"predicted: {predicted['file_bytes']:,} bytes ({decimal(job.file_bytes)}), {predicted['bpw']:.3f} bpw")
    print(f"types: {_counts([qtype.name for qtype in job.table.types.values()])}")
    replaced = [f"{item['requested'].upper()} -> {item['written'].upper()}" for item in content["fallbacks"]]
    print(f"rows that do not fit what the recipe asks for: {_counts(replaced) if replaced else 'none'}")


def _counts(names: Sequence[str]) -> str:
    return ", ".join(f"{name} x {count}" for name, count in Counter(names).most_common())
