"""Sweep: tiers of one model planned from one error table, and where there is a text also written and measured.

A folder gets for each tier NAME.txt, its override table, and NAME.txt.json, its sidecar; and `results.json`, see
`sweep_results`. A tier that is in the results is not done again. A quantized file is verified, measured and removed, so
that one is on the disk at a time; a tier is entered when all of that is done, and the next run overwrites what a killed
one left. Not done: tiers in parallel.
"""

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma4q_kernels.ggml import type_name
from tqdm import tqdm

from gguf_mixed.base_file import Comparison, ensure_base, remove_base
from gguf_mixed.engine import Found, prepare
from gguf_mixed.errors import InputError
from gguf_mixed.identity import model_sha256, named
from gguf_mixed.llama_cpp import Log
from gguf_mixed.perplexity import divergence
from gguf_mixed.quantize import partial_path
from gguf_mixed.sidecar import write_plan
from gguf_mixed.sweep_results import Entry, Results
from gguf_mixed.sweep_tiers import STOCK, Planned, Planner, Tier
from gguf_mixed.tensors import read_inventory

BASE_NAME = "base.kld"
_MEASURING = ".measuring.gguf"


@dataclass(frozen=True)
class Evaluation:
    """How tiers are written and measured.

    Attributes:
        engine: what writes the files.
        base: the base file to use and keep; None: one in the folder, removed when all tiers are done.
        threads: of the writing.
        keep: leave the quantized files in the folder.
    """

    comparison: Comparison
    engine: Found
    base: Path | None = None
    threads: int = 1
    keep: bool = False


def pending_tiers(folder: Path, tiers: Sequence[Tier], results: Results, evaluation: Evaluation | None) -> list[Tier]:
    """The tiers that are still to be done."""

    def done(tier: Tier) -> bool:
        entry = results.tiers.get(tier.name)
        if entry is None:
            # A stock mix may have lacked llama-quantize, which may be there now.
            return not tier.asked and tier.name in results.skipped and not tier.recipe.startswith(STOCK)
        if evaluation is None:
            return True
        return entry["measured"] is not None and (not evaluation.keep or _model_path(folder, tier).exists())

    return [tier for tier in tiers if not done(tier)]


def plan_tiers(planner: Planner, tiers: Sequence[Tier], results: Results) -> list[Planned]:
    """Plan tiers; those that nobody asked for and this model cannot have are noted as skipped.

    Raises:
        InputError: see `Planner.plan`; no tier is left.
    """
    planned = []
    for tier in tiers:
        try:
            planned.append(planner.plan(tier))
        except InputError as error:
            if tier.asked:
                raise
            results.skipped[tier.name] = str(error)
    if not planned and not results.tiers:
        raise InputError(f"no tier is possible: {next(iter(results.skipped.values()))}")
    return planned


def run_tiers(
    folder: Path, planned: Sequence[Planned], results: Results, evaluation: Evaluation | None, say: Log
) -> None:
    """Do tiers one by one and save the results after each.

    Args:
        planned: smaller results come first whatever the order.
        say: gets what the user should know before it happens, such as the size of the base file.

    Raises:
        InputError: a file cannot be written or measured, or is not as planned.
    """
    if evaluation is None:
        for each in planned:
            _enter(folder, results, each)
        results.save()
        return
    base = evaluation.base or folder / BASE_NAME
    if planned:
        ensure_base(evaluation.comparison, base, say)
    with tqdm(planned, unit="tier", disable=not sys.stderr.isatty()) as progress:
        for each in progress:
            progress.set_postfix_str(each.tier.name)
            _enter(folder, results, each, _measure(folder, each, evaluation, base))
            results.save()
    results.save()
    if evaluation.base is None:
        remove_base(base)


def _enter(
    folder: Path,
    results: Results,
    planned: Planned,
    found: Mapping[str, Any] | None = None,
) -> None:
    """Write a tier's table and its line in the results, with what `_measure` found."""
    job, name = planned.job, planned.tier.name
    write_plan(_table_path(folder, planned.tier), job.table, planned.sidecar)
    entry: Entry = {
        "name": name,
        "recipe": planned.tier.recipe,
        "file_bytes": job.file_bytes,
        "bpw": job.bpw,
        "types": dict(Counter(type_name(job.written[tensor]) for tensor in job.table.types).most_common()),
        "predicted": planned.divergence,
        "not_in_error_table": list(planned.missing),
        **(found or {"model": None, "measured": None, "seconds": None}),
    }
    results.tiers[name] = entry
    results.skipped.pop(name, None)


def _measure(folder: Path, planned: Planned, evaluation: Evaluation, base: Path) -> dict[str, Any]:
    """Write, verify, compare and remove one tier's file; its digest, the figures, and how long it took."""
    output = _model_path(folder, planned.tier)
    if not evaluation.keep:  # a file that the user has made of the same table stays
        output = output.with_suffix(_MEASURING)
    table = _table_path(folder, planned.tier)
    write_plan(table, planned.job.table, planned.sidecar)
    started = time.perf_counter()
    writing = prepare(evaluation.engine, planned.job, table, output, threads=evaluation.threads)
    differences = writing.run(lambda line: None, overwrite=True)
    if differences:
        more = f" and {len(differences) - 1} more differences" if len(differences) > 1 else ""
        raise InputError(f"{partial_path(output)}: not as planned: {differences[0]}{more}")
    written = time.perf_counter()
    try:
        found = divergence(evaluation.comparison.tool, output, base, threads=evaluation.comparison.threads)
        model = named(_model_path(folder, planned.tier), model_sha256(read_inventory(output)))
    finally:
        if not evaluation.keep:
            output.unlink()
    seconds = {"quantize": round(written - started, 2), "measure": round(time.perf_counter() - written, 2)}
    return {"model": model, "measured": asdict(found), "seconds": seconds}


def _table_path(folder: Path, tier: Tier) -> Path:
    return folder / f"{tier.name}.txt"


def _model_path(folder: Path, tier: Tier) -> Path:
    return folder / f"{tier.name}.gguf"
