"""Provenance of an override table, in `TABLE.json` beside it, because the table itself admits no comments."""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gemma4q_kernels.ggml import GGMLQuantizationType, type_name

from gguf_mixed import strict_json
from gguf_mixed.atomic_file import write_file
from gguf_mixed.errors import InputError
from gguf_mixed.identity import file_sha256, named
from gguf_mixed.overrides import OverrideTable
from gguf_mixed.quantize import Job
from gguf_mixed.tensors import Inventory, RequestedTypes

FORMAT = 1
_PACKAGES = ("vllm-gemma4q", "gguf", "numpy", "scipy")
_PIECE = 1 << 20


def sidecar_path(table: Path) -> Path:
    """Where the provenance of a table lies."""
    return table.with_name(table.name + ".json")


def describe(
    job: Job,
    requested: RequestedTypes,
    recipe: str,
    arguments: Mapping[str, object],
    sensitivity: str,
    divergence: float | None = None,
    errors: str | None = None,
) -> dict[str, Any]:
    """The sidecar's content.

    Args:
        requested: types before substitution.
        recipe: of the recipe or the solver that chose them.
        arguments: given to it, and what it says of its choice.
        sensitivity: where the cost of an error in one tensor against another comes from.
        divergence: expected, in nats a token, where that sensitivity was measured.
        errors: where the error of each type comes from, None where the recipe looks at none.
    """
    inventory = job.inventory
    return {
        "format": FORMAT,
        "model": {
            "name": inventory.path.name,
            "bytes": inventory.file_bytes,
            "header_sha256": header_sha256(inventory),
            "tensors": len(inventory.tensors),
            "parameters": inventory.n_elements,
        },
        "imatrix": None if job.imatrix_path is None else named(job.imatrix_path, file_sha256(job.imatrix_path)),
        "recipe": recipe,
        "arguments": dict(arguments),
        "sensitivity": sensitivity,
        "errors": errors,
        "predicted": {
            "file_bytes": job.file_bytes,
            "tensor_bytes": job.tensor_bytes,
            "bpw": job.bpw,
            "divergence": divergence,
        },
        "file_type": job.file_type,
        "fallbacks": fallbacks(job, requested),
        "types": {name: type_name(qtype) for name, qtype in job.written.items()},
        "table_sha256": hashlib.sha256(job.table.text.encode()).hexdigest(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    }


def fallbacks(job: Job, requested: RequestedTypes) -> list[dict[str, str]]:
    """Tensors whose rows do not fit the requested type, in file order."""
    return [
        {"tensor": name, "requested": type_name(requested[name]), "written": type_name(written)}
        for name, written in job.written.items()
        if name in requested and written != requested[name]
    ]


def header_sha256(inventory: Inventory) -> str:
    """Hash of everything before the weights, of all the model's files in order."""
    digest = hashlib.sha256()
    for header in inventory.headers:
        digest.update(bytes.fromhex(_sha256(header.path, header.data_start)))
    return digest.hexdigest()


def write_plan(path: Path, table: OverrideTable, content: Mapping[str, Any]) -> None:
    """Write a table, and its sidecar first: a kill in between leaves a table that is refused, not one unexplained.

    Raises:
        InputError: see `write_file`.
    """
    write_file(sidecar_path(path), json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_file(path, table.text)


def read_sidecar(table_path: Path, table: OverrideTable) -> dict[str, Any] | None:
    """The sidecar of a table, None where there is none.

    Raises:
        InputError: not ours, damaged, or the table was changed since.
    """
    path = sidecar_path(table_path)
    if not path.exists():
        return None
    try:
        content = strict_json.parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name}: not a sidecar: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path.name}: not a sidecar of format {FORMAT}")
    if content.get("table_sha256") != hashlib.sha256(table.text.encode()).hexdigest():
        raise InputError(f"{table_path.name}: changed since it was planned: plan again, or remove {path.name}")
    model, types, file_type = (content.get(key) for key in ("model", "types", "file_type"))
    if not isinstance(model, dict) or not all(isinstance(model.get(key), str) for key in ("name", "header_sha256")):
        raise InputError(f"{path.name}: model is {model!r}, expected its name and header_sha256")
    imatrix = content.get("imatrix")
    if imatrix is not None and not _is_named(imatrix):
        raise InputError(f"{path.name}: imatrix is {imatrix!r}, expected its name and sha256")
    if "file_type" not in content or (file_type is not None and type(file_type) is not int):
        raise InputError(f"{path.name}: file_type is {file_type!r}, expected a number")
    if not isinstance(types, dict):
        raise InputError(f"{path.name}: types is {types!r}, expected types by tensor")
    for name, kind in types.items():
        if not isinstance(kind, str) or kind.upper() not in GGMLQuantizationType.__members__:
            raise InputError(f"{path.name}: tensor {name}: {kind!r} is not a type of ggml's")
    return content


def planned_types(content: Mapping[str, Any]) -> dict[str, GGMLQuantizationType]:
    """Type of every tensor, kept ones included, as planned."""
    return {name: GGMLQuantizationType[kind.upper()] for name, kind in content["types"].items()}


def check_model(content: Mapping[str, Any], inventory: Inventory) -> None:
    """Check that a table was planned for this model.

    Raises:
        InputError: it was planned for another.
    """
    if content["model"]["header_sha256"] != header_sha256(inventory):
        raise InputError(
            f"{inventory.path.name}: the table was planned for another model, {content['model']['name']} "
            "(its header's hash differs)"
        )


def check_imatrix(content: Mapping[str, Any], table_path: Path, imatrix: Path | None) -> None:
    """Check that a table that was planned with an imatrix is used with it; one planned without takes any.

    Raises:
        InputError: another file or none; or it cannot be read.
    """
    planned = content.get("imatrix")
    given = None if imatrix is None else named(imatrix, file_sha256(imatrix))
    if planned is not None and (given is None or given["sha256"] != planned["sha256"]):
        got = "none" if given is None else _short(given)
        raise InputError(f"{table_path.name}: planned with imatrix {_short(planned)}, got {got}")


def _is_named(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("name", "sha256"))


def _short(file: Mapping[str, str]) -> str:
    return f"{file['name']} ({file['sha256'][:8]})"


def _sha256(path: Path, n_bytes: int) -> str:
    digest = hashlib.sha256()
    left = n_bytes
    with path.open("rb") as file:
        while left > 0 and (piece := file.read(min(_PIECE, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
