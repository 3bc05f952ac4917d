"""An allocation from end to end: sensitivity and real quantizers -> error table -> the best types for a budget.

The table is measured once and serves every budget; of a model whose weights are not at hand, only its header, it is a
prior. Types that hardly any plan would choose are left out unless they are asked for.
"""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma4q_kernels.ggml import QUANTIZABLE_TYPES, GGMLQuantizationType, bits_per_weight

from gguf_mixed.atomic_file import WriteError, refusals
from gguf_mixed.error_cache import ErrorCache
from gguf_mixed.error_table import ErrorRow, ErrorTable, Pins, check_source, usable_types
from gguf_mixed.llama_cpp import cache_folder
from gguf_mixed.measure import Sampling, load_quantizers, measure
from gguf_mixed.prior_errors import SOURCE, prior_errors
from gguf_mixed.recipes import optimal
from gguf_mixed.recipes.base import Material, quantizable
from gguf_mixed.recipes.optimal import Budget
from gguf_mixed.sensitivity import Sensitivity
from gguf_mixed.sidecar import header_sha256
from gguf_mixed.solver import Constraints
from gguf_mixed.tasks import Where, executor
from gguf_mixed.tensors import Inventory

# Ternary types are for models trained so; IQ1 and most of IQ2 quantize at 1 to 8 MB/s; the other 4-bit types lose 1.6
# to 5 times what IQ4_NL loses at its size. Q5_0 and Q5_1 stand in for Q4_K and Q5_K where rows do not fit these.
_ONLY_WHEN_ASKED = frozenset(
    (
        "IQ1_S",
        "IQ1_M",
        "IQ2_XXS",
        "IQ2_XS",
        "TQ1_0",
        "TQ2_0",
        "Q1_0",
        "Q2_0",
        "Q4_0",
        "Q5_0",
        "Q5_1",
        "MXFP4",
        "NVFP4",
        "F32",
    )
)
DEFAULT_TYPES = tuple(qtype for qtype in QUANTIZABLE_TYPES if qtype.name not in _ONLY_WHEN_ASKED)
# IQ2_S builds its tables for 4.5 s of a processor before the first row, and above this size hardly a tensor gets it.
_TYPE_FOR_SMALL_BUDGETS, _SMALL_BUDGET_BPW = GGMLQuantizationType.IQ2_S, 3.5


def default_types(bpw: float) -> tuple[GGMLQuantizationType, ...]:
    """The types to choose from for a budget of `bpw` bits a weight, where the user names none."""
    if bpw < _SMALL_BUDGET_BPW:
        return DEFAULT_TYPES
    return tuple(qtype for qtype in DEFAULT_TYPES if qtype is not _TYPE_FOR_SMALL_BUDGETS)


@dataclass(frozen=True)
class Measuring:
    """How an error table is measured, see `measure`. `cache` None: the user's cache folder, by the model's header.

    `where` workers are; where this process does it all, `threads` of it do.
    """

    sampling: Sampling = field(default_factory=Sampling)
    threads: int = 1
    cache: Path | None = None
    progress: bool = False
    where: Where = field(default_factory=Where)


def error_table(
    material: Material,
    sensitivity: Sensitivity,
    types: Sequence[GGMLQuantizationType] = DEFAULT_TYPES,
    how: Measuring = Measuring(),
    constraints: Constraints | None = None,
) -> ErrorTable:
    """The error table of a model: see `describe_errors` for where its errors come from.

    Args:
        types: for all tensors to choose from.
        constraints: their pins are rows of the tensors that they pin, and of no others.

    Raises:
        InputError: see `load_quantizers` and `measure`, or `prior_errors`; a pattern that is no regular expression, a
            cache named by the user that cannot be made or that another run has.
    """
    pins = _pins(material.inventory, constraints or Constraints())
    if material.inventory.header_only:
        return prior_errors(material.inventory, sensitivity, material.imatrix, types, pins)
    opened = _default_cache(material.inventory) if how.cache is None else _opened(how.cache)
    with contextlib.closing(opened) as cache, executor(how.where, by_core=True) as workers:
        return measure(
            material.inventory,
            load_quantizers(material.llama_cpp),
            sensitivity,
            material.imatrix,
            types,
            how.sampling,
            how.threads,
            cache,
            how.progress,
            workers,
            pins,
        )


def check_feasible(
    material: Material,
    sensitivity: Sensitivity,
    types: Sequence[GGMLQuantizationType],
    budget: Budget,
    constraints: Constraints,
) -> None:
    """Refuse within a second what would be refused after measuring.

    Raises:
        InputError: a sensitivity of another model, a budget or constraint that cannot be met, no type for a tensor.
    """
    header_only = material.inventory.header_only
    priced = error_table if header_only else _sizes
    table = priced(material, sensitivity, types, constraints=constraints)
    optimal.check_feasible(material, table, budget, constraints)


def _sizes(
    material: Material, sensitivity: Sensitivity, types: Sequence[GGMLQuantizationType], constraints: Constraints
) -> ErrorTable:
    """The table with errors that only fall with the size."""
    check_source(material.inventory, material.imatrix)
    pins = _pins(material.inventory, constraints)
    rows = []
    for tensor in quantizable(material.inventory):
        sensitivity.of(tensor).check(tensor)
        weighted = material.imatrix is not None and material.imatrix.weights_of(tensor) is not None
        rows += [
            ErrorRow(tensor.name, qtype, tensor.bytes_as(qtype), 1 / bits_per_weight(qtype))
            for qtype in usable_types(tensor, types, weighted, QUANTIZABLE_TYPES, pins)
        ]
    return ErrorTable(rows)


def describe_errors(inventory: Inventory, sampling: Sampling) -> str:
    """Where the errors of `error_table` come from, for the sidecar."""
    return SOURCE if inventory.header_only else f"measured, {sampling.n_rows} rows a tensor"


def _pins(inventory: Inventory, constraints: Constraints) -> Pins:
    return constraints.pins_of(tensor.name for tensor in quantizable(inventory))


def _opened(path: Path) -> ErrorCache:
    """A cache, and its folder made. Raises WriteError: one of them cannot be written, or another run has it."""
    with refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return ErrorCache(path)


def _default_cache(inventory: Inventory) -> ErrorCache:
    """The user's cache; one without a file, with a note, where that cannot be written, as in containers without a home,
    or where another run has it."""
    try:
        return _opened(cache_folder().with_name("errors") / f"{header_sha256(inventory)[:16]}.jsonl")
    except WriteError as error:
        print(f"note: measured errors are not kept, unless with --cache FILE: {error}", file=sys.stderr)
        return ErrorCache(None)
