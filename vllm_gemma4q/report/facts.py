"""Everything that a report shows, collected from headers, the manifest, result files and, with a base, weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gemma4q.card.results import Measured, of_checkpoint
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.commands.progress import byte_bar
from vllm_gemma4q.compare.results import read_results
from vllm_gemma4q.doctor.diagnose import Diagnosis, diagnose, open_patient
from vllm_gemma4q.doctor.engines import EXLLAMAV3, LLAMA_CPP, VLLM, VLLM_STOCK, parse_engine
from vllm_gemma4q.doctor.subject import Scheme, Subject
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.report.checkpoint_parts import checkpoint_parts, scheme_words
from vllm_gemma4q.report.grid import COUNTERS, Cell, Errors, Grid, RoleRow, by_role, make_grid
from vllm_gemma4q.report.manifest import Manifest, read_manifest
from vllm_gemma4q.report.memory import Memory, memory_of

if TYPE_CHECKING:
    from gguf_mixed.tensors import Inventory

NOTED = "noted by the quantizer while it wrote the checkpoint"
MEASURED = "measured against the unquantized model"
NO_MANIFEST = "There is no manifest that notes errors: --base, with the unquantized model, measures them."
NO_ERRORS = "The manifest notes no errors of linears: --base, with the unquantized model, measures them."
GGUF_NO_BASE = "A GGUF file notes no errors: --base, with the unquantized model as a GGUF, measures them."


@dataclass(frozen=True)
class Facts:
    """One checkpoint.

    Attributes:
        scheme: what its weights are, for people.
        n_bytes: of all files with weights.
        errors: where the errors of the grid come from; None where there are none.
        no_errors: why there are none.
        memory: rows of the engines that load the format, or why there are none.
    """

    name: str
    scheme: str
    n_bytes: int
    n_tensors: int
    grid: Grid
    roles: Sequence[RoleRow]
    diagnoses: Sequence[Diagnosis]
    memory: Memory
    errors: str | None
    no_errors: str
    manifest: Manifest = field(default_factory=Manifest)
    results: Measured = field(default_factory=Measured)

    @property
    def total(self) -> RoleRow:
        return self.roles[-1]


def collect(path: Path, base: Path | None, results: Sequence[Path], engines: Sequence[str] | None) -> Facts:
    """Read what there is; weights only with a base, and then with a progress bar on a terminal.

    Args:
        path: a checkpoint folder or a .gguf file.
        base: the unquantized model in the same form.
        results: files that `evaluate` and `sweep` printed.
        engines: as `doctor --engine` takes them; None: those that might load it.

    Raises:
        InputError: no such checkpoint (see `open_patient`), engine, or base; results of another checkpoint.
    """
    patient = open_patient(path, base if path.suffix != ".gguf" else None)
    if isinstance(patient, Subject):
        return _of_checkpoint(patient, results, engines)
    return _of_gguf(patient, base, results, engines)


def _of_checkpoint(subject: Subject, results: Sequence[Path], engines: Sequence[str] | None) -> Facts:
    from vllm_gemma4q.calibration.identity import model_identity

    manifest = read_manifest(subject.folder)
    errors, source = _checkpoint_errors(subject, manifest)
    parts = list(checkpoint_parts(subject))
    types = [layer.layer_type for layer in subject.architecture.layers]
    identity = model_identity(open_checkpoint(subject.folder)) if results else None
    return Facts(
        name=subject.folder.resolve().name,
        scheme=scheme_words(subject),
        n_bytes=sum(file.stat().st_size for file in sorted({tensor.path for tensor in subject.tensors.values()})),
        n_tensors=len(subject.tensors),
        grid=make_grid(parts, types, errors, manifest.notes),
        roles=by_role(parts, manifest.bytes_before),
        diagnoses=_diagnoses(subject, engines),
        memory=memory_of(subject.folder),
        errors=source,
        no_errors=_why_no_errors(subject, manifest),
        manifest=manifest,
        results=_results(results, identity),
    )


def _checkpoint_errors(subject: Subject, manifest: Manifest) -> tuple[Errors, str | None]:
    if subject.base is None:
        return manifest.errors, NOTED if manifest.errors else None
    from vllm_gemma4q.report.measured import Work, measure_errors

    work = Work(subject, subject.base)
    with byte_bar(work.n_bytes, "measuring") as bar:
        measured = measure_errors(subject, work, bar.update)
    return measured, MEASURED if measured else None


def _why_no_errors(subject: Subject, manifest: Manifest) -> str:
    if subject.scheme is Scheme.UNQUANTIZED:
        return "Nothing is quantized."
    if subject.base is not None and subject.refusal is not None:
        return f"The plugin refuses the checkpoint, so that its weights mean nothing: {subject.refusal}."
    if subject.base is not None:
        return f"Linears of {scheme_words(subject)} that could be compared with the base: none."
    if manifest.stale:
        return f"The manifest is of another checkpoint: {manifest.stale}. --base measures errors."
    return NO_ERRORS if manifest.content else NO_MANIFEST


def _of_gguf(
    inventory: "Inventory", base: Path | None, results: Sequence[Path], engines: Sequence[str] | None
) -> Facts:
    from gguf_mixed.identity import model_sha256
    from vllm_gemma4q.report.gguf_parts import gguf_layer_types, gguf_layers, gguf_parts

    layers = gguf_layers(inventory)
    parts = list(gguf_parts(inventory, layers))
    errors = {} if base is None else _gguf_errors(inventory, base)
    identity = {"name": inventory.path.name, "sha256": model_sha256(inventory)} if results else None
    return Facts(
        name=inventory.path.name,
        scheme="GGUF",
        n_bytes=inventory.file_bytes,
        n_tensors=len(inventory.tensors),
        grid=make_grid(parts, gguf_layer_types(inventory, layers), errors, {}),
        roles=by_role(parts, {}),
        diagnoses=_diagnoses(inventory, engines),
        memory=memory_of(inventory.path),
        errors=MEASURED if errors else None,
        no_errors=GGUF_NO_BASE,
        results=_results(results, identity),
    )


def _results(paths: Sequence[Path], identity: Mapping[str, str] | None) -> Measured:
    """Figures in result files; `identity` may be None where there are no files: it takes time."""
    if identity is None:
        return Measured()
    return of_checkpoint(read_results(paths, [identity], "this checkpoint"), identity["sha256"])


def _gguf_errors(inventory: "Inventory", base: Path) -> Errors:
    from gguf_mixed.tensors import read_inventory
    from vllm_gemma4q.report.measured_gguf import measure_errors, pairs

    if base.suffix != ".gguf":
        raise InputError(f"--base {base}: expected an unquantized .gguf file for a .gguf file")
    compared = pairs(inventory, read_inventory(base))
    with byte_bar(sum(tensor.n_elements for tensor, _ in compared), "measuring") as bar:
        return measure_errors(compared, bar.update)


def _diagnoses(patient: "Subject | Inventory", names: Sequence[str] | None) -> list[Diagnosis]:
    if isinstance(patient, Subject):
        table = None
        others = [EXLLAMAV3] if patient.scheme is Scheme.EXL3 else []
        default = [VLLM, VLLM_STOCK, *others]
    else:
        from vllm_gemma4q.doctor.checks.gguf import find_overrides

        table, default = find_overrides(patient.path), [LLAMA_CPP]
    return [diagnose(patient, engine, table) for engine in map(parse_engine, names or default)]


def as_json(facts: Facts) -> dict[str, Any]:
    """What `--json` prints: the grid and figures of the page; findings are `gemma4q doctor --json`'s."""
    return {
        "name": facts.name,
        "scheme": facts.scheme,
        "bytes": facts.n_bytes,
        "tensors": facts.n_tensors,
        "parameters": facts.total.parameters,
        "roles": {row.role: _role_json(row) for row in facts.roles},
        "layer_types": list(facts.grid.layer_types),
        "modules": [column.value for column in facts.grid.columns],
        "errors": facts.errors,
        "cells": [
            {"layer": layer, "module": column.value, **_cell_json(cell)}
            for (layer, column), cell in facts.grid.cells.items()
        ],
        "outside": {cell.label: _cell_json(cell) for cell in facts.grid.outside.values()},
        "verdicts": {one.engine.label: one.verdict.name.lower() for one in facts.diagnoses},
    }


def _role_json(row: RoleRow) -> Mapping[str, int]:
    return {key: getattr(row, key) for key in COUNTERS}


def _cell_json(cell: Cell) -> dict[str, Any]:
    spread = cell.errors
    return {
        "names": list(cell.names),
        "count": cell.count,
        "dtypes": dict(cell.dtypes),
        "parameters": cell.parameters,
        "bytes": cell.n_bytes,
        "bits": cell.bits,
        "error": None if spread is None else [*map(_finite, (spread.least, spread.median, spread.largest))],
    }


def _finite(error: float) -> float | None:
    """JSON has no word for infinity."""
    return error if math.isfinite(error) else None
