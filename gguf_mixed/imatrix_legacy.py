"""The imatrix format before GGUF (`.dat`).

Layout (little-endian): i32 entries; per entry i32 length, name, i32 calls, i32 values, f32[values]; then, both
optional, i32 chunks and i32 length, dataset. Values are `sums / counts * calls`, `calls` counted in chunks, so that
`values / calls` is the weight; with 0 calls, the values are. All experts of a tensor lie end to end and their own
counts are lost.
Source: `save_imatrix_legacy` (tools/imatrix/imatrix.cpp), common/imatrix-loader.cpp and `load_imatrix`
(tools/quantize/quantize.cpp), b11434.
"""

import struct
from pathlib import Path

import numpy as np

from gguf_mixed.atomic_file import write_file
from gguf_mixed.errors import InputError
from gguf_mixed.imatrix import Imatrix, ImatrixEntry

_I32 = struct.Struct("<i")
_LEAST_ENTRY_BYTES = 4 + 1 + 4 + 4 + 4


def read_legacy(path: Path) -> Imatrix:
    """Read a `.dat` imatrix. Counts are in chunks, one per entry; `chunk_size` is None.

    Raises:
        InputError: unreadable, not an imatrix, truncated, or with a repeated name or impossible values.
    """
    try:
        reader = _Reader(path.name, path.read_bytes())
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read: {error.strerror or error}") from error
    n_entries = reader.i32("the number of entries")
    if not 0 < n_entries * _LEAST_ENTRY_BYTES <= reader.left:
        raise InputError(f"{path.name}: not an imatrix: it starts with {n_entries} entries in {reader.left} bytes")
    entries: dict[str, ImatrixEntry] = {}
    for _ in range(n_entries):
        name, entry = _read_entry(path, reader)
        if name in entries:
            raise InputError(f"{path.name}: tensor {name} appears twice")
        entries[name] = entry
    chunks = reader.i32("the number of chunks") if reader.left else 0
    dataset = reader.text("the data set") if reader.left else ""
    return Imatrix(entries, (dataset,) if dataset else (), max(chunks, 0), None)


def write_legacy(imatrix: Imatrix, path: Path) -> tuple[str, ...]:
    """Write a `.dat` imatrix and return the tensors it leaves out because they saw nothing.

    As llama-imatrix does, experts without data get the weight 1 and only the last data set is named.
    """
    kept = {name: entry for name, entry in sorted(imatrix.entries.items()) if entry.counts.any()}
    parts = [_I32.pack(len(kept))]
    for name, entry in kept.items():
        calls = -(-int(entry.counts.max()) // (imatrix.chunk_size or 1))
        parts += [*_text(name), _I32.pack(calls), _I32.pack(entry.sums.size)]
        parts.append((entry.weights * np.float32(calls)).astype("<f4").tobytes())
    parts += [_I32.pack(imatrix.chunk_count), *_text(imatrix.datasets[-1] if imatrix.datasets else "")]
    write_file(path, b"".join(parts))
    return tuple(name for name in imatrix.entries if name not in kept)


def _text(text: str) -> tuple[bytes, bytes]:
    raw = text.encode()
    return _I32.pack(len(raw)), raw


def _read_entry(path: Path, reader: "_Reader") -> tuple[str, ImatrixEntry]:
    name = reader.text("a tensor name")
    if not name:
        raise InputError(f"{path.name}: not an imatrix: a tensor name is empty")
    calls = reader.i32(f"tensor {name}")
    n_values = reader.i32(f"tensor {name}")
    if n_values < 1:
        raise InputError(f"{path.name}: tensor {name}: {n_values} values, expected at least 1")
    values = np.frombuffer(reader.take(4 * n_values, f"tensor {name}"), dtype="<f4").astype(np.float32)
    try:
        # With 0 calls llama-quantize takes the values as they are, which is what 1 call means.
        return name, ImatrixEntry(values[None, :], np.array([calls or 1], dtype=np.int64))
    except InputError as error:
        raise InputError(f"{path.name}: tensor {name}: {error}") from error


class _Reader:
    """A position in the bytes; every read is checked against their end."""

    def __init__(self, label: str, content: bytes) -> None:
        self.label, self.content, self.position = label, content, 0

    @property
    def left(self) -> int:
        return len(self.content) - self.position

    def take(self, n_bytes: int, what: str) -> bytes:
        if not 0 <= n_bytes <= self.left:
            raise InputError(f"{self.label}: truncated or not an imatrix: {what}: {n_bytes} bytes of {self.left} left")
        self.position += n_bytes
        return self.content[self.position - n_bytes : self.position]

    def i32(self, what: str) -> int:
        return int(_I32.unpack(self.take(_I32.size, what))[0])

    def text(self, what: str) -> str:
        raw = self.take(self.i32(what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.label}: not an imatrix: {what} is not UTF-8: {raw[:40]!r}") from None
