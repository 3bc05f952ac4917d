"""Compare a GGUF file with what was planned: every tensor's type, the file's size, its label."""

from collections.abc import Mapping
from pathlib import Path

from gemma4q_kernels.ggml import GGMLQuantizationType, tensor_bytes
from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from gguf_mixed.errors import InputError
from gguf_mixed.header import pad
from gguf_mixed.tensors import Inventory, Tensor, read_inventory


def find_differences(
    written: Path, types: Mapping[str, GGMLQuantizationType], file_type: int | None, file_bytes: int | None = None
) -> list[str]:
    """What is not as planned, one line each; empty when all is.

    Args:
        types: of every tensor of the file, those that are never quantized too.
        file_type: the label, `general.file_type`; None: there is none.
        file_bytes: the predicted size. None where the keys are not known (the path of the imatrix is one): then the
            header is taken as it is, and the data must have the planned size.

    Raises:
        InputError: the file cannot be read or is truncated, see `read_inventory`; its rows cannot have a planned type.
    """
    inventory = read_inventory(written)
    return [*_types(inventory, types), *_label(inventory, file_type), *_size(inventory, types, file_bytes)]


def _types(inventory: Inventory, types: Mapping[str, GGMLQuantizationType]) -> list[str]:
    found = inventory.tensors
    lines = [f"tensor {name}: not in the file, expected {qtype.name}" for name, qtype in types.items()
             if name not in found]  # fmt: skip
    for name, tensor in found.items():
        expected = types.get(name)
        if expected is None:
            lines.append(f"tensor {name}: got {tensor.qtype.name}, expected no such tensor")
        elif tensor.qtype != expected:
            lines.append(f"tensor {name}: got {tensor.qtype.name}, expected {expected.name}")
    return lines


def _label(inventory: Inventory, file_type: int | None) -> list[str]:
    found = inventory.headers[0].get("general.file_type")
    return [] if found == file_type else [f"general.file_type: got {found}, expected {file_type}"]


def _size(inventory: Inventory, types: Mapping[str, GGMLQuantizationType], file_bytes: int | None) -> list[str]:
    size = sum(header.path.stat().st_size for header in inventory.headers)
    if file_bytes is None:
        if set(types) != set(inventory.tensors):
            return []  # the missing or surplus tensor is reported already, and its size is not known
        sizes = (_bytes_of(tensor, types[name]) for name, tensor in inventory.tensors.items())
        file_bytes = inventory.headers[0].data_start + sum(pad(size, GGUF_DEFAULT_ALIGNMENT) for size in sizes)
    return [] if size == file_bytes else [f"size: got {size:,} bytes, expected {file_bytes:,}"]


def _bytes_of(tensor: Tensor, planned: GGMLQuantizationType) -> int:
    try:
        return tensor_bytes(planned, tensor.shape)
    except ValueError as error:
        raise InputError(f"tensor {tensor.name}: planned as {planned.name}: {error}") from error
