"""The header that llama-quantize writes, byte for byte: the input's keys, the changed ones, the tensor entries.

Keys keep the input's order; each that is set moves to the end, in the order of `Job.metadata_changes`. ggml copies
strings as C strings, so they end at a zero byte. Tensors are sorted by block, then by name, those outside blocks first.
Source: `llama_model_quantize_impl` (src/llama-quant.cpp), `weight_name_comparer` (src/llama-model-loader.h),
`gguf_set_kv` and `gguf_write_out` (ggml/src/gguf.cpp), b11434.
"""

import re
import struct
from typing import BinaryIO

from gemma4q_kernels.ggml import tensor_bytes
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
    copied = _copied_keys(job.inventory.headers[0])
    keys = [raw for key, raw in copied.items() if key not in changes]
    keys += [_string(key.encode()) + _value(value) for key, value in changes.items() if value is not None]
    parts = [_FIXED.pack(b"GGUF", _VERSION, len(job.inventory.tensors), len(keys)), *keys]
    offset = 0
    for tensor in written_order(job):
        qtype = job.written[tensor.name]
        sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        parts += [_string(tensor.name.encode()), sizes, _OFFSET.pack(qtype.value, offset)]
        offset += pad(tensor_bytes(qtype, tensor.shape), GGUF_DEFAULT_ALIGNMENT)
    header = b"".join(parts)
    return header.ljust(pad(len(header), GGUF_DEFAULT_ALIGNMENT), b"\0")


def _position(tensor: Tensor) -> tuple[int, bytes]:
    match = _BLOCK.match(tensor.name)
    return int(match[1]) if match else -1, tensor.name.encode()


def _copied_keys(header: Header) -> dict[str, bytes]:
    """Every key with its kind and value as ggml writes it; `read_header` has checked that all of it is there."""
    with header.path.open("rb") as file:
        file.seek(FIXED_BYTES)
        return {key: _copied(file, entry) for key, entry in header.metadata.items()}


def _copied(file: BinaryIO, entry: KeyValue) -> bytes:
    start = file.read(8 + len(entry.key.encode()) + 4)
    left = entry.written_bytes - len(start)
    if entry.kind is GGUFValueType.STRING:
        return start + _c_string(file)
    if entry.kind is not GGUFValueType.ARRAY:
        return start + file.read(left)
    array = file.read(_ARRAY.size)
    kind, count = _ARRAY.unpack(array)
    if kind != GGUFValueType.STRING:
        return start + array + file.read(left - len(array))
    return start + array + b"".join(_c_string(file) for _ in range(count))


def _c_string(file: BinaryIO) -> bytes:
    (length,) = _U64.unpack(file.read(_U64.size))
    return _string(file.read(length).partition(b"\0")[0])


def _string(raw: bytes) -> bytes:
    return _U64.pack(len(raw)) + raw


def _value(value: Scalar) -> bytes:
    """The kind and value of a key that is set: llama-quantize stores every integer as u32."""
    if isinstance(value, str):
        return _U32.pack(GGUFValueType.STRING) + _string(value.encode(errors="surrogateescape"))
    return _U32.pack(GGUFValueType.UINT32) + struct.pack("<I", value)
