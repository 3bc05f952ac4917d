"""The header of a safetensors file, parsed strictly and written canonically.

Layout: 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes. The JSON maps
each name to `{"dtype", "shape", "data_offsets": [start, end]}`, offsets relative to the end of the
header, plus an optional `__metadata__` of strings.
Source: https://github.com/huggingface/safetensors (format section of its README).

The safetensors library maps whole files into memory; the tools here read ranges of rows instead, so
they need the offsets themselves. What the library lets pass and we refuse: duplicate keys, names that a terminal would
act on, files that are none (a pipe would be waited for), and headers that would not fit into memory once parsed.
"""

import json
import math
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_mixed import strict_json
from vllm_gemma4q.errors import InputError, reading

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = strict_json.MAX_BYTES  # the library allows 100 MB
_MAX_DIMENSIONS = 32
_MAX_NAME = 1000
_MAX_SIZE = 2**63 - 1
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `start` and `end` are absolute byte offsets in the file `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int

    @property
    def row_length(self) -> int:
        """Elements in one row, a row being everything behind all axes but the last."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file by name, in the order of their bytes.

    Raises:
        InputError: the file is truncated, its header is not valid, a key is repeated, a dtype is unknown, or
            tensors overlap, leave holes, or disagree with their shapes.
    """
    with reading(path):
        size = _size_of_file(path)
        with path.open("rb") as file:
            prefix = file.read(_LENGTH.size)
            length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - _LENGTH.size):
                raise InputError(f"{path.name}: truncated or not safetensors: header of {length} bytes in {size}")
            text = file.read(length)
    try:
        header = strict_json.parse(text)
    except ValueError as error:
        raise InputError(f"{path.name}: header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise InputError(f"{path.name}: header is {type(header).__name__}, expected an object")
    data_start = _LENGTH.size + length
    tensors = [_parse_entry(path, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_contiguous(path, tensors, data_start, size)
    return {tensor.name: tensor for tensor in tensors}


def write_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Header bytes for (name, dtype, shape) tensors stored back to back in that order, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: unreadable, not JSON, not an object, or with a repeated key.
    """
    try:
        with reading(path):
            size = _size_of_file(path)
            if size > strict_json.MAX_BYTES:
                raise InputError(f"{path.name}: {size:,} bytes, expected at most {strict_json.MAX_BYTES:,}")
            content = path.read_bytes()
        value = strict_json.parse(content)
    except ValueError as error:
        raise InputError(f"{path.name}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path.name}: holds {type(value).__name__}, expected an object")
    return value


def _size_of_file(path: Path) -> int:
    """Raises InputError: a pipe or a device, of which reading may never end."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise InputError(f"{path.name}: not a file")
    return state.st_size


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path.name}: tensor {name}"
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise InputError(f"{where}: a name of {len(name)} characters, expected at most {_MAX_NAME}, all printable")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: header entry must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InputError(f"{where}: dtype {dtype!r} is unknown, expected one of {', '.join(DTYPE_BYTES)}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise InputError(f"{where}: shape {shape!r} and data_offsets {offsets!r} must be non-negative integers")
    if len(shape) > _MAX_DIMENSIONS:
        raise InputError(f"{where}: {len(shape)} dimensions, expected at most {_MAX_DIMENSIONS}")
    start, end = offsets
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - start != expected:
        raise InputError(f"{where}: got {end - start} bytes, expected {expected} for {dtype} {shape}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + start, data_start + end)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_SIZE for item in value)


def _check_contiguous(path: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    cursor = data_start
    for tensor in tensors:
        if tensor.start != cursor:
            what = "overlaps the one before" if tensor.start < cursor else "leaves a hole before it"
            raise InputError(f"{path.name}: tensor {tensor.name}: {what}: starts at {tensor.start}, expected {cursor}")
        cursor = tensor.end
    if cursor != size:
        what = "truncated" if size < cursor else "trailing bytes"
        raise InputError(f"{path.name}: {what}: file has {size} bytes, expected {cursor}")
