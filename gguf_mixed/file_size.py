"""The size, to the byte, of the file that llama-quantize writes.

Header, keys, tensor entries, padding, then each tensor padded, the last one too. llama-quantize copies the input's
keys, sets or replaces two, drops those of split files, and adds four when it is given an imatrix.
Source: `llama_model_quantize_impl` (src/llama-quant.cpp), `llama_quantize` (tools/quantize/quantize.cpp),
`gguf_write_out` (ggml/src/gguf.cpp), b11434.
"""

from collections.abc import Mapping

from gemma4q_kernels.ggml import tensor_bytes
from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from gguf_mixed.errors import InputError
from gguf_mixed.header import FIXED_BYTES, Scalar, pad
from gguf_mixed.imatrix import Imatrix
from gguf_mixed.tensors import Inventory, RequestedTypes, Tensor, written_types

# None removes the key. Integers become u32, whatever they were. Only the size of a value matters here.
MetadataChanges = Mapping[str, Scalar | None]

ALWAYS_CHANGED: MetadataChanges = {
    "general.quantization_version": 0,
    "general.file_type": 0,
    "split.no": None,
    "split.count": None,
    "split.tensors.count": None,
}
_LONGEST_OVERRIDE = 127  # bytes: the fixed buffer for a string override
_HALF_CHARACTERS = "surrogateescape"  # the buffer may end inside one


def metadata_changes(
    imatrix: Imatrix | None = None, imatrix_argument: str = "", overrides: Mapping[str, Scalar] | None = None
) -> dict[str, Scalar | None]:
    """What llama-quantize does to the keys.

    Args:
        imatrix: the one given to it, if any.
        imatrix_argument: its path exactly as on the command line: it is stored.
        overrides: those given as --override-kv.
    """
    changes: dict[str, Scalar | None] = {**ALWAYS_CHANGED, **(overrides or {})}
    if imatrix is not None and imatrix.entries:
        changes["quantize.imatrix.file"] = _cut(imatrix_argument)
        if imatrix.datasets:
            changes["quantize.imatrix.dataset"] = _cut(imatrix.datasets[0])
        changes["quantize.imatrix.entries_count"] = len(imatrix.entries)
        if imatrix.chunk_count > 0:
            changes["quantize.imatrix.chunks_count"] = imatrix.chunk_count
    return changes


def header_bytes(inventory: Inventory, changes: MetadataChanges = ALWAYS_CHANGED) -> int:
    """Bytes before the data, padding included. Types do not matter: an entry has one size for all.

    Raises:
        InputError: `general.alignment` is not 32. llama-quantize pads to 32 and copies the key, and then cannot
            read its own output.
    """
    alignment = inventory.headers[0].alignment
    if alignment != GGUF_DEFAULT_ALIGNMENT:
        raise InputError(
            f"{inventory.path.name}: general.alignment is {alignment}; llama-quantize pads to {GGUF_DEFAULT_ALIGNMENT} "
            "and keeps the key, which makes its output unreadable: rewrite the file without that key"
        )
    kept = sum(entry.written_bytes for key, entry in inventory.metadata.items() if key not in changes)
    changed = sum(
        8 + len(key.encode()) + 4 + _value_bytes(value) for key, value in changes.items() if value is not None
    )
    entries = sum(_entry_bytes(tensor) for tensor in inventory.tensors.values())
    return pad(FIXED_BYTES + kept + changed + entries, GGUF_DEFAULT_ALIGNMENT)


def predict_size(inventory: Inventory, requested: RequestedTypes, changes: MetadataChanges = ALWAYS_CHANGED) -> int:
    """Bytes of the output when `requested` is asked for, every substitution that llama-quantize makes included.

    Raises:
        InputError: see `written_types` and `header_bytes`.
    """
    types = written_types(inventory, requested)
    data = sum(
        pad(tensor_bytes(types[name], tensor.shape), GGUF_DEFAULT_ALIGNMENT)
        for name, tensor in inventory.tensors.items()
    )
    return header_bytes(inventory, changes) + data


def _entry_bytes(tensor: Tensor) -> int:
    return 8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape) + 4 + 8


def _value_bytes(value: Scalar) -> int:
    if isinstance(value, str):
        return 8 + len(value.encode(errors=_HALF_CHARACTERS))
    return 1 if isinstance(value, bool) else 4


def _cut(text: str) -> str:
    return text.encode()[:_LONGEST_OVERRIDE].decode(errors=_HALF_CHARACTERS)
