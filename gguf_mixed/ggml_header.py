"""The header that llama-quantize writes, byte for byte: the input's keys, the changed ones, the tensor entries.

Keys keep the input's order; each that is set moves to the end, in the order of `Job.metadata_changes`. ggml copies
strings as C strings, so they end at a zero byte. Tensors are sorted by block, then by name, those outside blocks first.
Source: `llama_model_quantize_impl` (src/llama-quant.cpp), `weight_name_comparer` (src/llama-model-loader.h),
`gguf_set_kv` and `gguf_write_out` (ggml/src/gguf.cpp), b11434.
"""

import re
import struct
from collections.abc import Iterable, Sequence
from typing import BinaryIO

from gemma4q_kernels.ggml import GGMLQuantizationType, tensor_bytes
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from gguf_mixed.header import FIXED_BYTES, Header, KeyValue, Scalar, pad
from gguf_mixed.quantize import Job
from gguf_mixed.tensors import Tensor

_VERSION = 3
_FIXED = struct.Struct("<4sIQQ")
_ARRAY = struct.Struct("<IQ")
_OFFSET = struct.Struct("<IQ")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_BLOCK = re.compile(r"blk\.(\d+)", re.ASCII)

Listed = tuple[str, tuple[int, ...], GGMLQuantizationType]


def written_order(job: Job) -> list[Tensor]:
    """The model's tensors in the order of the output."""
    return sorted(job.inventory.tensors.values(), key=_position)


def output_header(job: Job) -> bytes:
    """Everything before the data, padding included.

    Raises:
        InputError: see `header_bytes`.
        OSError: the model cannot be read.
    """
    changes = job.metadata_changes
    copied = copied_keys(job.inventory.headers[0])
    keys = [raw for key, raw in copied.items() if key not in changes]
    keys += [key_bytes(key, value) for key, value in changes.items() if value is not None]
    listed = [(tensor.name, tensor.shape, job.written[tensor.name]) for tensor in written_order(job)]
    return assemble(keys, listed, GGUF_DEFAULT_ALIGNMENT)


def assemble(keys: Sequence[bytes], tensors: Iterable[Listed], alignment: int) -> bytes:
    """Everything before the data, padding included.

    Args:
        keys: each with its kind and value, as stored.
        tensors: name, shape with the row length first, type; in the order of their data.
        alignment: what `general.alignment` says among the keys, 32 where it does not.
    """
    entries: list[bytes] = []
    offset = 0
    for name, shape, qtype in tensors:
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        entries.append(_string(name.encode()) + sizes + _OFFSET.pack(qtype.value, offset))
        offset += pad(tensor_bytes(qtype, shape), alignment)
    header = b"".join([_FIXED.pack(b"GGUF", _VERSION, len(entries), len(keys)), *keys, *entries])
    return header.ljust(pad(len(header), alignment), b"\0")


def key_bytes(key: str, value: Scalar) -> bytes:
    """A key that is set, with its kind and value."""
    return _string(key.encode()) + _value(value)


def _position(tensor: Tensor) -> tuple[int, bytes]:
    match = _BLOCK.match(tensor.name)
    return int(match[1]) if match else -1, tensor.name.encode()


def copied_keys(header: Header, exactly: bool = False) -> dict[str, bytes]:
    """Every key with its kind and value; `read_header` has checked that all of it is there.

    Args:
        exactly: as stored. Else as ggml writes it: strings end at their first zero byte.
    """
    with header.path.open("rb") as file:
        file.seek(FIXED_BYTES)
        return {key: _copied(file, entry, exactly) for key, entry in header.metadata.items()}


def _copied(file: BinaryIO, entry: KeyValue, exactly: bool) -> bytes:
    start = file.read(8 + len(entry.key.encode()) + 4)
    left = entry.written_bytes - len(start)
    if entry.kind is GGUFValueType.STRING:
        return start + _copied_string(file, exactly)
    if entry.kind is not GGUFValueType.ARRAY:
        return start + file.read(left)
    array = file.read(_ARRAY.size)
    kind, count = _ARRAY.unpack(array)
    if kind != GGUFValueType.STRING:
        return start + array + file.read(left - len(array))
    return start + array + b"".join(_copied_string(file, exactly) for _ in range(count))


def _copied_string(file: BinaryIO, exactly: bool) -> bytes:
    (length,) = _U64.unpack(file.read(_U64.size))
    raw = file.read(length)
    return _string(raw if exactly else raw.partition(b"\0")[0])


def _string(raw: bytes) -> bytes:
    return _U64.pack(len(raw)) + raw


def _value(value: Scalar) -> bytes:
    """The kind and value of a key that is set: llama-quantize stores every integer as u32."""
    if isinstance(value, str):
        return _U32.pack(GGUFValueType.STRING) + _string(value.encode(errors="surrogateescape"))
    return _U32.pack(GGUFValueType.UINT32) + struct.pack("<I", value)
