"""Sizes and names of ggml's types. The `gguf` package's table is the only source of block sizes.

A type stores `block_size` consecutive weights of a row in `block_bytes` bytes; a row is an integer number of blocks.
Which types can be written at all is the list in `ggml_quantize_chunk` (ggml/src/ggml.c): Q8_1 and Q8_K
exist only between operations, integers and F64 are never a target.
"""

import math
from collections.abc import Sequence

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

__all__ = [
    "FLOAT_TYPES",
    "QUANTIZABLE_TYPES",
    "GGMLQuantizationType",
    "bits_per_weight",
    "block_bytes",
    "block_size",
    "parse_type",
    "row_bytes",
    "tensor_bytes",
    "type_name",
]

FLOAT_TYPES = frozenset({GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16})

_NEVER_WRITTEN = frozenset({"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"})


def block_size(qtype: GGMLQuantizationType) -> int:
    """Weights in one block."""
    return GGML_QUANT_SIZES[qtype][0]


def block_bytes(qtype: GGMLQuantizationType) -> int:
    """Bytes of one block."""
    return GGML_QUANT_SIZES[qtype][1]


def bits_per_weight(qtype: GGMLQuantizationType) -> float:
    """Bits a weight takes, its share of the block's scales included."""
    size, n_bytes = GGML_QUANT_SIZES[qtype]
    return 8 * n_bytes / size


def row_bytes(qtype: GGMLQuantizationType, row_length: int) -> int:
    """Bytes of one row.

    Raises:
        ValueError: the row is not a whole number of blocks.
    """
    size, n_bytes = GGML_QUANT_SIZES[qtype]
    if row_length % size:
        raise ValueError(f"rows of {row_length} are not a multiple of {qtype.name}'s block of {size}")
    return row_length // size * n_bytes


def tensor_bytes(qtype: GGMLQuantizationType, shape: Sequence[int]) -> int:
    """Bytes of a tensor, without alignment.

    Args:
        shape: in ggml's order: the row length first.
    """
    return row_bytes(qtype, shape[0]) * math.prod(shape[1:])


def type_name(qtype: GGMLQuantizationType) -> str:
    """The name in lower case, as override files write it; llama-quantize compares without case."""
    return qtype.name.lower()


def parse_type(name: str) -> GGMLQuantizationType:
    """The type of that name, in any case.

    Raises:
        ValueError: no such type, or one that cannot be written into a model.
    """
    known = {qtype.name: qtype for qtype in QUANTIZABLE_TYPES}
    try:
        return known[name.upper()]
    except KeyError:
        raise ValueError(
            f"{name!r} is not a type a model can be quantized to, expected one of {', '.join(known)}"
        ) from None


def _by_size(qtype: GGMLQuantizationType) -> tuple[float, int]:
    return bits_per_weight(qtype), qtype.value


# Smallest first; of two that are equally large, the older first.
QUANTIZABLE_TYPES: tuple[GGMLQuantizationType, ...] = tuple(
    sorted((qtype for qtype in GGML_QUANT_SIZES if qtype.name not in _NEVER_WRITTEN), key=_by_size)
)
