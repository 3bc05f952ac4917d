"""A file that keeps measured sums tensor by tensor, so that an interrupted measurement goes on where it stopped.

Layout: a first line that names the format, then one JSON object a line: tensor, digest of all that its sums depend on,
and the sums by name. Lines are appended; of several with one tensor and digest the last counts. One process at a time
may have it.
"""

import json
import os
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf_mixed import strict_json
from gguf_mixed.atomic_file import lock, refusals
from gguf_mixed.errors import InputError

Sums = dict[str, float]

_HEADER = {"gguf-mixed error cache": 1}


class ErrorCache:
    """Sums by tensor and digest; without a file, they live as long as this object."""

    def __init__(self, path: Path | None) -> None:
        """Open a cache file, made where it is missing; a last line that was cut off is removed.

        Raises:
            InputError: it holds something else, a line is damaged, it cannot be written, or another process has it.
        """
        self._path, self._lock = path, threading.Lock()
        self._known: dict[tuple[str, str], Sums] = {}
        if path is not None:
            with refusals(path):
                self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._finalizer = weakref.finalize(self, os.close, self._descriptor)
            try:
                lock(self._descriptor, path)
                self._load(path)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Let go of the file; also done when this object goes."""
        if self._path is not None:
            self._finalizer()

    def get(self, tensor: str, digest: str) -> Sums:
        """What is known of a tensor: empty, or sums by name; do not change it."""
        return self._known.get((tensor, digest), {})

    def add(self, tensor: str, digest: str, sums: Sums) -> None:
        """Keep sums, in the place of those under the same digest. Safe to call from several threads.

        Raises:
            InputError: the file cannot be written.
        """
        with self._lock:
            self._known[tensor, digest] = sums
            if self._path is not None:
                self._append(self._path, {"tensor": tensor, "digest": digest, "sums": sums})

    def _append(self, path: Path, value: Mapping[str, Any]) -> None:
        line = memoryview(json.dumps(value).encode() + b"\n")
        with refusals(path):
            while line:
                line = line[os.write(self._descriptor, line) :]

    def _load(self, path: Path) -> None:
        header = json.dumps(_HEADER).encode() + b"\n"
        content = path.read_bytes()
        if not content.startswith(header) and not header.startswith(content):  # a kill may have cut the header itself
            raise InputError(f"{path.name}: exists and is not a cache of measured errors")
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            with refusals(path):
                os.ftruncate(self._descriptor, len(complete))
        if not complete:
            self._append(path, _HEADER)
        for line in complete.splitlines()[1:]:
            try:
                tensor, digest, sums = _parse(line)
                self._known[tensor, digest] = sums
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path.name}: damaged: {line[:60]!r}; remove it to measure again") from error


def _parse(line: bytes) -> tuple[str, str, Sums]:
    """Raises ValueError, KeyError or TypeError: not such a line."""
    entry = strict_json.parse(line)
    tensor, digest, sums = entry["tensor"], entry["digest"], entry["sums"]
    if not isinstance(tensor, str) or not isinstance(digest, str):
        raise ValueError("tensor and digest must be text")
    if not isinstance(sums, dict) or not all(type(value) in (int, float) for value in sums.values()):
        raise ValueError("sums must be numbers by name")
    return tensor, digest, sums
