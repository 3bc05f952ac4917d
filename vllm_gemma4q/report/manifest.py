"""What the manifest of a checkpoint says: who made it, and the errors and counts that the writer noted.

EXL3 notes each linear's relative squared error (`nmse`) and that of its outputs (`proxy`), FP8 how many weights were
clipped or became zero and the share of inputs beyond their scale; INT8 notes nothing by linear. A manifest whose files
are not those in the folder is of another checkpoint: it is shown as such, and its figures are not used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from vllm_gemma4q.checkpoint.header import read_json
from vllm_gemma4q.checkpoint.run import MANIFEST
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.report.grid import SATURATED, Errors, Notes

_COUNTS = {
    "weight_clipped": "weights clipped",
    "weight_underflowed": "weights rounded to zero",
    "input_saturated": SATURATED,
}


@dataclass(frozen=True)
class Manifest:
    """A manifest, or the empty one of a checkpoint that has none.

    Attributes:
        content: of the file.
        stale: the first file that is not as the manifest says; None where all are.
    """

    content: Mapping[str, Any] = field(default_factory=dict)
    stale: str | None = None

    @property
    def errors(self) -> Errors:
        """Noted errors of linears, by full name of the module."""
        found = {name: row.get("nmse") for name, row in self._linears.items()}
        return {name: (float(error),) for name, error in found.items() if _is_number(error) and error >= 0}

    @property
    def notes(self) -> Notes:
        """Noted counts of linears, in words, by full name of the module."""
        return {
            name: {words: row[key] for key, words in _COUNTS.items() if _is_number(row.get(key))}
            for name, row in self._linears.items()
        }

    @property
    def bytes_before(self) -> Mapping[str, int]:
        """Bytes of the original by role."""
        return {} if self.stale else {role: row["bytes_before"] for role, row in self.summary.items()}

    @property
    def summary(self) -> Mapping[str, Mapping[str, int]]:
        """Counters by role, see `summary.summarize`."""
        found = self.content.get("summary")
        rows = found if isinstance(found, dict) else {}
        return {role: row for role, row in rows.items() if isinstance(row, dict) and _is_size(row.get("bytes_before"))}

    @property
    def _linears(self) -> Mapping[str, Mapping[str, Any]]:
        details = self.content.get("details")
        found = details.get("linears") if isinstance(details, dict) else None
        if self.stale or not isinstance(found, dict):
            return {}
        return {name: row for name, row in found.items() if isinstance(row, dict)}


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a folder, empty where there is none.

    Raises:
        InputError: it cannot be read, or is no manifest: the page shows its files, command and versions as they are.
    """
    if not (folder / MANIFEST).is_file():
        return Manifest()
    content = read_json(folder / MANIFEST)
    output = content.get("output")
    if not _is_files(output) or not all("bytes" in file for file in output.values()):
        raise InputError(f"{MANIFEST}: output: got {type(output).__name__}, expected bytes and sha256 by file")
    if not _is_files(content.get("source") or {}):
        raise InputError(f"{MANIFEST}: source: got {type(content['source']).__name__}, expected sizes by file")
    for key, kind in (("command", list), ("versions", dict)):
        if not isinstance(content.get(key) or kind(), kind):
            raise InputError(f"{MANIFEST}: {key}: got {type(content[key]).__name__}, expected {kind.__name__}")
    return Manifest(content, next((text for text in _differences(folder, output)), None))


def _differences(folder: Path, output: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Weight files that are not as long as they were when they were written. Hashing them would take minutes."""
    found = []
    for name, file in output.items():
        path = folder / name
        if Path(name).name != name or not name.endswith(".safetensors"):
            continue
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != file["bytes"]:
            found.append(f"{name} has {path.stat().st_size:,} bytes, the manifest says {file['bytes']:,}")
    return found


def _is_files(value: object) -> TypeGuard[dict[str, dict[str, Any]]]:
    """Whether a value tells sizes, or at least none that are wrong, by file."""
    return isinstance(value, dict) and all(
        isinstance(file, dict) and _is_size(file.get("bytes", 0)) for file in value.values()
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
