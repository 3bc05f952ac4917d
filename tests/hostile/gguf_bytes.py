"""GGUF files byte by byte, written without the code under test, so that every length and count may lie.

Source of the layout: docs/gguf.md of ggml.
"""

import struct
from dataclasses import dataclass, field

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


@dataclass(frozen=True)
class Key:
    """One key: kind and value; of an array, the kind of its items too."""

    name: str
    kind: int
    value: object
    items: int = U32


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header lists it."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass
class File:
    """A file. `fields` are (offset, width) of every integer of the header, known after `to_bytes`."""

    keys: list[Key]
    tensors: list[TensorInfo]
    data: bytes = b""
    version: int = 3
    alignment: int = 32
    fields: list[tuple[int, int]] = field(default_factory=list)
    _out: bytearray = field(default_factory=bytearray)

    def to_bytes(self) -> bytes:
        """All of it."""
        self._out, self.fields = bytearray(b"GGUF"), []
        self._integer(self.version, 4)
        self._integer(len(self.tensors), 8)
        self._integer(len(self.keys), 8)
        for key in self.keys:
            self._string(key.name)
            self._integer(key.kind, 4)
            self._value(key)
        for tensor in self.tensors:
            self._string(tensor.name)
            self._integer(len(tensor.shape), 4)
            for size in tensor.shape:
                self._integer(size, 8)
            self._integer(tensor.kind, 4)
            self._integer(tensor.offset, 8)
        self._out += bytes(-len(self._out) % self.alignment)
        return bytes(self._out) + self.data

    def _value(self, key: Key) -> None:
        if key.kind == ARRAY:
            assert isinstance(key.value, list)
            self._integer(key.items, 4)
            self._integer(len(key.value), 8)
            for item in key.value:
                self._scalar(key.items, item)
        else:
            self._scalar(key.kind, key.value)

    def _scalar(self, kind: int, value: object) -> None:
        if kind == STRING:
            self._string(str(value))
        else:
            self.fields.append((len(self._out), struct.calcsize(_FORMATS[kind])))
            self._out += struct.pack(f"<{_FORMATS[kind]}", value)

    def _string(self, text: str) -> None:
        raw = text.encode("utf-8", "surrogateescape")
        self._integer(len(raw), 8)
        self._out += raw

    def _integer(self, value: int, width: int) -> None:
        self.fields.append((len(self._out), width))
        self._out += (value % 256**width).to_bytes(width, "little")
