"""What tells inputs apart: digests that records of expensive results keep, so that none is taken for another's.

Not done: hashing all of a model's weights, which would take minutes for the large ones.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from gguf_mixed.errors import InputError
from gguf_mixed.header import Header
from gguf_mixed.tensors import Inventory

_BYTES_OF_TENSOR = 4096


def model_sha256(inventory: Inventory) -> str:
    """Digest of a model's headers and the first 4096 bytes of each tensor: two fine-tunes may have one header."""
    digest = hashlib.sha256()
    for header in inventory.headers:
        _add_file(digest, header)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Digest of a whole file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read: {error.strerror or error}") from error


def _add_file(digest: "hashlib._Hash", header: Header) -> None:
    with header.path.open("rb") as file:
        digest.update(file.read(header.data_start))
        for tensor in header.tensors:
            file.seek(tensor.start)
            digest.update(file.read(_BYTES_OF_TENSOR))


def named(path: Path, sha256: str) -> dict[str, str]:
    """How a record names a file."""
    return {"name": path.name, "sha256": sha256}


def first_difference(found: Mapping[str, object], expected: Mapping[str, object]) -> str | None:
    """What tells two records apart, in words; None where they agree. Files are compared by digest, not by name."""
    for key, value in expected.items():
        if key not in found or _content(found[key]) != _content(value):
            return f"{key} {_short(found.get(key))}, expected {_short(value)}"
    return None


def _content(value: object) -> object:
    return value["sha256"] if isinstance(value, dict) and "sha256" in value else value


def _short(value: object) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"{value.get('name')} ({str(value['sha256'])[:8]})"
    return str(value)
