"""`results.json` of a sweep: what was made of which inputs, written anew after every tier.

Layout: `format`; `inputs`: files by digest, and options, that decide the plans; `evaluation`: text, chunks and context
of the measurement, None where there was none; `skipped`: default tiers that this model cannot have, and why; `tiers`:
by rising size, each with `file_bytes`, `bpw`, `types` (tensors of each), `predicted` (nats, or None), `model` (name and
digest of the file that was measured, or None), `measured` (`perplexity.Divergence`, or None) and `seconds`. All but
`seconds` is decided by inputs and evaluation.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf_mixed import strict_json
from gguf_mixed.atomic_file import PARTIAL, refusals, write_file
from gguf_mixed.errors import InputError
from gguf_mixed.identity import first_difference

FORMAT = "gguf-mixed sweep 1"
FILE_NAME = "results.json"

Entry = dict[str, Any]


@dataclass
class Results:
    """The content of a file, and where it is."""

    path: Path
    inputs: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None
    skipped: dict[str, str] = field(default_factory=dict)
    tiers: dict[str, Entry] = field(default_factory=dict)

    @property
    def content(self) -> dict[str, Any]:
        entries = sorted(self.tiers.values(), key=lambda entry: (entry["file_bytes"], entry["name"]))
        return {
            "format": FORMAT,
            "inputs": self.inputs,
            "evaluation": self.evaluation,
            "skipped": dict(sorted(self.skipped.items())),
            "tiers": entries,
        }

    def save(self) -> None:
        """Write the file; it appears only when it is complete. Raises InputError: see `write_file`."""
        write_file(self.path, json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")


def open_results(folder: Path, inputs: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> Results:
    """The results in a folder, empty where there are none yet.

    Args:
        folder: held by the caller.
        inputs, evaluation: of this run. Without an evaluation, earlier measurements are kept.

    Raises:
        InputError: not such a file, or results of other inputs.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return Results(path, inputs, evaluation)
    try:
        found = strict_json.parse(path.read_bytes())
        if found["format"] != FORMAT:
            raise InputError(f"{path}: got format {found['format']}, expected {FORMAT}")
        tiers = {_name(entry): entry for entry in found["tiers"]}
        evaluated = found["evaluation"]
        if not isinstance(found["inputs"], dict) or not isinstance(evaluated, dict | None):
            raise ValueError("inputs and evaluation must be objects")
        known = Results(path, found["inputs"], evaluated, dict(found["skipped"]), tiers)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged: {type(error).__name__}: {error}; another FOLDER, or remove it") from error
    _check_same(path, known.inputs, inputs)
    if known.evaluation is None:
        known.evaluation = evaluation
    elif evaluation is not None:
        _check_same(path, known.evaluation, evaluation)
    with refusals(path):  # what a run that was killed in its last save has left: nothing else would remove it
        path.with_name(path.name + PARTIAL).unlink(missing_ok=True)
    return known


def _name(entry: Entry) -> str:
    """A tier's. Raises ValueError, KeyError or TypeError: it cannot be told or sorted."""
    if not isinstance(entry["name"], str) or type(entry["file_bytes"]) is not int:
        raise ValueError("a tier without name and file_bytes")
    return entry["name"]


def _check_same(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    difference = first_difference(found, expected)
    if difference:
        raise InputError(f"{path}: of another sweep, made with {difference}; another FOLDER, or remove it")
