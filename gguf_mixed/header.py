"""The header of a GGUF file, read strictly and without touching the weights.

Layout (little-endian): magic `GGUF`, u32 version, u64 tensor count, u64 key count; per key a string, u32 kind, value;
per tensor a string name, u32 dimensions, that many u64 sizes (row length first), u32 type, u64 offset; padding to
`general.alignment`; data. A string is a u64 length and its bytes; an array is u32 kind, u64 count, items.
Source: docs/gguf.md of ggml, and `gguf_init_from_reader` in llama.cpp's ggml/src/gguf.cpp (b11434) for the checks.

Why not the `gguf` package's GGUFReader: a slice past the end of its memory map is silently short, so a key that claims
2^60 bytes loops until memory runs out; sizes wrap in 64 bits; offsets are not checked; and it keeps one object per
vocabulary entry (20 s and 1.1 GB for Gemma 4's, read here in 0.4 s). Its constants are used here.

Two lengths of a key are kept apart: what the file holds, and what ggml writes when it copies the key, because it
copies strings as C strings and so cuts them at a zero byte.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from gemma4q_kernels.ggml import GGMLQuantizationType, block_size, tensor_bytes
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from gguf_mixed.errors import InputError

Scalar = int | float | bool | str

MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 63  # GGML_MAX_NAME without its terminating zero
KEPT_ITEMS = 1024  # longer arrays are vocabularies: measured, not kept
FIXED_BYTES = 24
_MAX_SIZE = 2**63 - 1
_LEAST_KEY_BYTES = 8 + 1 + 4 + 1
_LEAST_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8

_FORMATS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f", GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?",
}  # fmt: skip
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class KeyValue:
    """One key of the metadata. `value` is None for an array of more than KEPT_ITEMS; `written_bytes` see above."""

    key: str
    kind: GGUFValueType
    value: Scalar | tuple[Scalar, ...] | None
    written_bytes: int


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header lists it: shape with the row length first, `start` absolute in the file."""

    name: str
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    start: int

    @property
    def n_bytes(self) -> int:
        return tensor_bytes(self.qtype, self.shape)


@dataclass(frozen=True)
class Header:
    """Everything before the data. `header_only`: the file ends here, as when only its beginning was fetched."""

    path: Path
    metadata: dict[str, KeyValue]
    tensors: tuple[TensorEntry, ...]
    alignment: int
    data_start: int
    file_bytes: int
    header_only: bool

    def get(self, key: str) -> Scalar | tuple[Scalar, ...] | None:
        """Value of a key, None where it is absent or a long array."""
        entry = self.metadata.get(key)
        return entry.value if entry else None


def read_header(path: Path) -> Header:
    """Read and check a header.

    Raises:
        InputError: unreadable, not a GGUF, truncated, a count or size that cannot be, a repeated key or tensor, an
            unknown type, or data that overlaps, leaves holes or ends outside the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path.name}: not a GGUF file: it does not start with GGUF")
            if size < FIXED_BYTES:
                raise InputError(f"{path.name}: truncated: {size} bytes, a GGUF header has at least {FIXED_BYTES}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Parser(path, content, size).header()
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read: {error.strerror or error}") from error


class _Parser:
    """A position in the mapped file; every read is checked against its end."""

    def __init__(self, path: Path, content: mmap.mmap, size: int) -> None:
        self.path, self.content, self.size, self.position = path, content, size, 4

    def header(self) -> Header:
        version = self._u32()
        if version not in (2, 3):
            raise self._error("big-endian file" if not version & 0xFFFF else f"version {version}, expected 2 or 3")
        n_tensors, n_keys = self._u64(), self._u64()
        self._check_count("metadata keys", n_keys, _LEAST_KEY_BYTES)
        metadata: dict[str, KeyValue] = {}
        for _ in range(n_keys):
            entry = self._key_value()
            if entry.key in metadata:
                raise self._error(f"duplicate key {entry.key!r}")
            metadata[entry.key] = entry
        alignment = self._alignment(metadata)
        self._check_count("tensors", n_tensors, _LEAST_TENSOR_BYTES)
        found = [self._tensor() for _ in range(n_tensors)]
        return self._place(metadata, found, alignment)

    def _place(
        self,
        metadata: dict[str, KeyValue],
        found: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]],
        alignment: int,
    ) -> Header:
        """Turn offsets into positions, and demand what llama.cpp demands: tensors back to back, padded, in order."""
        data_start = pad(self.position, alignment)
        header_only = self.size <= data_start and bool(found)
        tensors: dict[str, TensorEntry] = {}
        cursor = 0
        for name, shape, qtype, offset in found:
            if name in tensors:
                raise self._error(f"duplicate tensor {name}")
            if offset != cursor:
                raise self._error(f"tensor {name}: data at offset {offset}, expected {cursor}")
            entry = tensors[name] = TensorEntry(name, shape, qtype, data_start + offset)
            end = entry.start + entry.n_bytes
            if end > self.size and not header_only:
                raise self._error(f"truncated: tensor {name} ends at byte {end}, the file has {self.size}")
            cursor = pad(cursor + entry.n_bytes, alignment)
        return Header(self.path, metadata, tuple(tensors.values()), alignment, data_start, self.size, header_only)

    def _alignment(self, metadata: dict[str, KeyValue]) -> int:
        entry = metadata.get("general.alignment")
        if entry is None:
            return GGUF_DEFAULT_ALIGNMENT
        value = entry.value
        if entry.kind is not GGUFValueType.UINT32 or not isinstance(value, int) or value.bit_count() != 1:
            raise self._error(f"general.alignment is {value!r} ({entry.kind.name}), expected a power of two (UINT32)")
        return value

    def _key_value(self) -> KeyValue:
        key = self._text("a metadata key")
        kind = self._kind(key)
        start = self.position
        if kind is GGUFValueType.STRING:
            raw = self._string(key)
            return self._entry(key, kind, raw.decode(errors="replace"), 8 + _c_length(raw))
        if kind is GGUFValueType.ARRAY:
            return self._array(key)
        value = self._numbers(kind, 1, key)[0]
        return self._entry(key, kind, value, self.position - start)

    def _array(self, key: str) -> KeyValue:
        kind = self._kind(key)
        count = self._u64()
        if kind is GGUFValueType.ARRAY:
            raise self._error(f"key {key!r}: arrays of arrays are not part of ggml's format")
        if kind is not GGUFValueType.STRING:
            start = self.position
            numbers = self._numbers(kind, count, key, keep=count <= KEPT_ITEMS)
            value = numbers if count <= KEPT_ITEMS else None
            return self._entry(key, GGUFValueType.ARRAY, value, 12 + self.position - start)
        self._check_count(f"strings in key {key!r}", count, 8)
        written = 12
        kept: list[Scalar] = []
        for _ in range(count):
            raw = self._string(key)
            written += 8 + _c_length(raw)
            if count <= KEPT_ITEMS:
                kept.append(raw.decode(errors="replace"))
        return self._entry(key, GGUFValueType.ARRAY, tuple(kept) if count <= KEPT_ITEMS else None, written)

    @staticmethod
    def _entry(key: str, kind: GGUFValueType, value: Scalar | tuple[Scalar, ...] | None, n_bytes: int) -> KeyValue:
        return KeyValue(key, kind, value, 8 + len(key.encode()) + 4 + n_bytes)

    def _kind(self, key: str) -> GGUFValueType:
        number = self._u32()
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self._error(f"key {key!r}: value of unknown kind {number}") from None

    def _numbers(self, kind: GGUFValueType, count: int, key: str, keep: bool = True) -> tuple[Scalar, ...]:
        item = struct.calcsize(_FORMATS[kind])
        start = self._take(count * item, f"key {key!r}")
        return struct.unpack_from(f"<{count}{_FORMATS[kind]}", self.content, start) if keep else ()

    def _tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._text("a tensor name")
        if len(name.encode()) > MAX_NAME_BYTES:
            raise self._error(f"tensor {name}: name of {len(name.encode())} bytes, ggml allows {MAX_NAME_BYTES}")
        dimensions = self._u32()
        if dimensions > MAX_DIMENSIONS:
            raise self._error(f"tensor {name}: {dimensions} dimensions, ggml allows {MAX_DIMENSIONS}")
        shape = tuple(self._u64() for _ in range(dimensions))
        number, offset = self._u32(), self._u64()
        n_elements = 1
        for size in shape:
            n_elements *= size
        if not 0 < n_elements <= _MAX_SIZE:
            raise self._error(f"tensor {name}: shape {list(shape)} holds {n_elements} weights, expected 1 to 2^63 - 1")
        try:
            qtype = GGMLQuantizationType(number)
        except ValueError:
            raise self._error(f"tensor {name}: type {number} is unknown to the installed gguf package") from None
        shape = without_trailing_ones(shape)
        if shape[0] % block_size(qtype):
            raise self._error(
                f"tensor {name}: rows of {shape[0]}, {qtype.name} needs a multiple of {block_size(qtype)}"
            )
        return name, shape, qtype, offset

    def _text(self, what: str) -> str:
        raw = self._string(what)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise self._error(f"{what} is not UTF-8: {raw[:40]!r}") from None
        if not text or "\0" in text:
            raise self._error(f"{what} is empty or holds a zero byte: {raw[:40]!r}")
        return text

    def _string(self, what: str) -> bytes:
        length = self._u64()
        start = self._take(length, what)
        return self.content[start : start + length]

    def _u32(self) -> int:
        return int(_U32.unpack_from(self.content, self._take(4, "the header"))[0])

    def _u64(self) -> int:
        return int(_U64.unpack_from(self.content, self._take(8, "the header"))[0])

    def _take(self, n_bytes: int, what: str) -> int:
        start = self.position
        if n_bytes > self.size - start:
            raise self._error(f"truncated: {what} needs {n_bytes} bytes at byte {start}, the file has {self.size}")
        self.position = start + n_bytes
        return start

    def _check_count(self, what: str, count: int, least_bytes: int) -> None:
        left = self.size - self.position
        if count * least_bytes > left:
            raise self._error(f"truncated or damaged: {count} {what} cannot fit in the {left} bytes left")

    def _error(self, message: str) -> InputError:
        return InputError(f"{self.path.name}: {message}")


def pad(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


def without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """ggml drops trailing sizes of 1 when it counts and writes dimensions; a scalar has the shape (1,)."""
    end = len(shape)
    while end > 1 and shape[end - 1] == 1:
        end -= 1
    return shape[:end] or (1,)


def _c_length(raw: bytes) -> int:
    end = raw.find(b"\0")
    return len(raw) if end < 0 else end
