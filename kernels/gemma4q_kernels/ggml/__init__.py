"""ggml's number formats: sizes, names, and which type llama-quantize writes for a row that does not fit.

Importing this package imports neither torch nor a compiled library.
"""

from gemma4q_kernels.ggml.fallback import NoFallbackError, fallback, is_legal, legal_types
from gemma4q_kernels.ggml.types import (
    FLOAT_TYPES,
    QUANTIZABLE_TYPES,
    GGMLQuantizationType,
    bits_per_weight,
    block_bytes,
    block_size,
    parse_type,
    row_bytes,
    tensor_bytes,
    type_name,
)

__all__ = [
    "FLOAT_TYPES",
    "QUANTIZABLE_TYPES",
    "GGMLQuantizationType",
    "NoFallbackError",
    "bits_per_weight",
    "block_bytes",
    "block_size",
    "fallback",
    "is_legal",
    "legal_types",
    "parse_type",
    "row_bytes",
    "tensor_bytes",
    "type_name",
]
