"""`gguf-mixed plan MODEL.gguf --recipe NAME -o overrides.txt`"""

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from gguf_mixed.allocation import Measuring, check_feasible, describe_errors, error_table
from gguf_mixed.atomic_file import check_not_read, check_place
from gguf_mixed.commands import allocation_options as options
from gguf_mixed.errors import InputError
from gguf_mixed.measure import N_ROWS, Sampling
from gguf_mixed.overrides import override_table
from gguf_mixed.quantize import Job
from gguf_mixed.recipes import Choice, Material, find_recipe
from gguf_mixed.recipes.optimal import Budget, optimal
from gguf_mixed.roles import group_by_role
from gguf_mixed.sidecar import describe, sidecar_path, write_plan
from gguf_mixed.sources import ROLE_PRIOR, find_sensitivity
from gguf_mixed.tasks import Where
from gguf_mixed.tasks import options as scale

FIXED_RULE = "none: the recipe is a fixed rule"
OPTIMAL = "optimal"


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="A model, or the first file of a split one.")],
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="optimal, rank15, rank15-legacy, cd-q6_k .. cd-q2_k, stock-MIX (stock-q4_k_m), uniform-TYPE.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The override table to write.")],
    imatrix: Annotated[Path | None, typer.Option(metavar="FILE", help="The importance matrix, GGUF or .dat.")] = None,
    bpw: Annotated[float | None, typer.Option(min=0.1, help="optimal: bits a weight, over all tensors.")] = None,
    size: Annotated[str | None, typer.Option(help="optimal: size of the whole file, as 14GiB or 9.8GB.")] = None,
    sensitivity: options.Sensitivity = ROLE_PRIOR,
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
    llama_cpp: Annotated[Path | None, typer.Option(metavar="DIR", help="Use the llama.cpp in here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the sidecar on stdout.")] = False,
) -> None:
    """Choose a type for every tensor; write the table for llama-quantize, and FILE.json saying where it comes from."""
    if ray is not None:  # other machines have another working directory
        model = model.absolute()
    material = Material.read(model, imatrix, llama_cpp)
    inventory = material.inventory
    if output.exists() and any(output.samefile(header.path) for header in inventory.headers):
        raise InputError(f"{output.name}: is the model itself")
    for path in (output, sidecar_path(output)):
        check_not_read(path, [imatrix, sensitivity])
        check_place(path)
    divergence: float | None = None
    errors: str | None = None
    if recipe.lower() == OPTIMAL:
        budget = Budget(bpw, None if size is None else options.parse_bytes(size))
        constraints = options.parse_constraints(pin, floor, uniform)
        choices = options.parse_types(types, backend, budget.bpw_of(inventory))
        source = find_sensitivity(sensitivity, inventory, force)
        check_feasible(material, source, choices, budget, constraints)
        if not source.measured:
            print(f"note: sensitivity is {source.source}, not measured on this model", file=sys.stderr)
        if inventory.header_only:
            print("note: errors of types are a prior: the file holds no weights, only a header", file=sys.stderr)
        here = threads or os.cpu_count() or 1
        how = Measuring(Sampling(rows, seed), here, cache, sys.stderr.isatty(), Where(workers, ray))
        table = error_table(material, source, choices, how, constraints)
        choice, described = optimal(material, table, budget, constraints), source.source
        divergence = sum(choice.errors.values()) if source.measured and not inventory.header_only else None
        errors = describe_errors(inventory, how.sampling)
    else:
        given = {"bpw": bpw, "size": size, "types": types, "backend": backend, "pin": pin, "floor": floor}
        for option in (name for name, value in {**given, "uniform": uniform}.items() if value):
            raise InputError(f"--{option}: recipe {recipe} is a fixed rule, expected --recipe {OPTIMAL} with it")
        choice, described = find_recipe(recipe)(material), FIXED_RULE
    job = Job(inventory, override_table(inventory, choice.types), material.imatrix, imatrix)
    content = describe(job, choice.types, recipe.lower(), choice.details, described, divergence, errors)
    write_plan(output, job.table, content)
    if as_json:
        print(json.dumps(content))
        return
    Console().print(_by_role(job, choice))
    predicted = content["predicted"]
    print(f"{output}: {len(job.table.types)} tensors, recipe {content['recipe']}; sensitivity: {described}")
    if errors is not None:
        print(f"errors of types: {errors}")
    print(f"predicted: {predicted['file_bytes']:,} bytes ({decimal(job.file_bytes)}), {predicted['bpw']:.3f} bpw")
    if divergence is not None:
        print(f"predicted divergence: {divergence:.4g} nats a token")
    replaced = [f"{item['requested'].upper()} -> {item['written'].upper()}" for item in content["fallbacks"]]
    print(f"rows that do not fit what the recipe asks for: {_counts(replaced) if replaced else 'none'}")


def _by_role(job: Job, choice: Choice) -> Table:
    table = Table(title=job.inventory.path.name)
    table.add_column("role", no_wrap=True)
    table.add_column("types", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("bpw", justify="right", no_wrap=True)
    if choice.errors:
        table.add_column("share of loss", justify="right", no_wrap=True)
    total = sum(choice.errors.values())
    for group in group_by_role(job.inventory):
        if group.kept_because:
            continue
        n_bytes = sum(tensor.bytes_as(job.written[tensor.name]) for tensor in group.tensors)
        cells = [
            group.role.removesuffix(".weight"),
            _counts([job.written[tensor.name].name for tensor in group.tensors]),
            decimal(n_bytes),
            f"{8 * n_bytes / group.n_elements:.3f}",
        ]
        if choice.errors:
            share = sum(choice.errors[tensor.name] for tensor in group.tensors) / (total or 1)
            cells.append(f"{share:.1%}")
        table.add_row(*cells)
    return table


def _counts(names: Sequence[str]) -> str:
    return ", ".join(f"{name} x {count}" for name, count in Counter(names).most_common())
