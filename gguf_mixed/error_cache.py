"""A file that keeps measured sums tensor by tensor, so that an interrupted measurement goes on where it stopped.

Layout: a first line that names the format, then one JSON object a line: tensor, digest of all that its sums depend on,
and the sums by name. Lines are appended; of several with one tensor and digest the last counts. Two processes must not
write one file.
"""

import json
import threading
from pathlib import Path

from gguf_mixed import strict_json
from gguf_mixed.errors import InputError

Sums = dict[str, float]

_HEADER = {"gguf-mixed error cache": 1}


class ErrorCache:
    """Sums by tensor and digest; without a file, they live as long as this object."""

    def __init__(self, path: Path | None) -> None:
        """Open a cache file, made where it is missing; a last line that was cut off is removed.

        Raises:
            InputError: it holds something else, or a line is damaged.
        """
        self._path, self._lock = path, threading.Lock()
        self._known: dict[tuple[str, str], Sums] = {}
        if path is not None:
            self._load(path)

    def get(self, tensor: str, digest: str) -> Sums:
        """What is known of a tensor: empty, or sums by name; do not change it."""
        return self._known.get((tensor, digest), {})

    def add(self, tensor: str, digest: str, sums: Sums) -> None:
        """Keep sums, in the place of those under the same digest. Safe to call from several threads."""
        with self._lock:
            self._known[tensor, digest] = sums
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps({"tensor": tensor, "digest": digest, "sums": sums}) + "\n")

    def _load(self, path: Path) -> None:
        header = json.dumps(_HEADER) + "\n"
        if not path.exists():
            path.write_text(header)
        content = path.read_bytes()
        if not content.startswith(header.encode()):
            raise InputError(f"{path.name}: exists and is not a cache of measured errors")
        complete = content[: content.rindex(b"\n") + 1]
        if len(complete) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(complete))
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
