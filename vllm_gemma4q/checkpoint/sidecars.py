"""The small files beside the weights: tokenizer, processor, chat template, generation configuration."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_gemma4q.checkpoint.reader import CONFIG, INDEX
from vllm_gemma4q.checkpoint.run import MANIFEST
from vllm_gemma4q.errors import InputError, reading

_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt"})
_LICENCES = ("license", "notice", "use_policy")
_WRITTEN_ANEW = frozenset({CONFIG, INDEX, MANIFEST})
_MAX_BYTES = 200_000_000  # five times the largest tokenizer


def sidecars(folder: Path) -> list[Path]:
    """Files of a checkpoint that a rewritten one needs unchanged: never weights, code or hidden files.

    Raises:
        InputError: one is a link that leaves the folder, or leads nowhere, or is too large to be what it says. A copy
            of what a link of an unpacked archive points to (a key, a password file) would be published as well.
        ReadError: one cannot be read.
    """

    def is_sidecar(path: Path) -> bool:
        if path.name in _WRITTEN_ANEW or path.name.startswith(".") or not (path.is_file() or _leads_nowhere(path)):
            return False
        return path.suffix in _SUFFIXES or path.name.lower().startswith(_LICENCES)

    with reading(folder):
        found = sorted(path for path in folder.iterdir() if is_sidecar(path))
    for path in found:
        _check(path, folder.resolve())
    return found


def _leads_nowhere(path: Path) -> bool:
    """A link to what is not there, as in a copy of a snapshot of Hugging Face's cache without its blobs."""
    return path.is_symlink() and not path.exists()


def _check(path: Path, folder: Path) -> None:
    if _leads_nowhere(path):
        raise InputError(f"{path.name}: a link to {path.readlink()}, where nothing is, expected a file")
    target = path.resolve()
    blobs = folder.parent.parent / "blobs"  # of Hugging Face's cache, whose snapshots are links into it
    if not target.is_relative_to(folder) and target.parent != blobs:
        raise InputError(
            f"{path.name}: a link to {target}, expected a file in {folder}: put a copy there if you want it"
        )
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
    if size > _MAX_BYTES:
        raise InputError(f"{path.name}: {size:,} bytes, expected at most {_MAX_BYTES:,}")


def to_json(value: Mapping[str, Any]) -> bytes:
    """JSON as Hugging Face tools write it: two spaces, a final newline, the order of keys kept."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
