"""The type llama-quantize writes when a row is not a whole number of blocks of the requested one.

Source: `tensor_type_fallback` in llama.cpp's src/llama-quant.cpp (b11434). It warns on its log and exits with 0,
so the file silently holds other types than asked for. Embedding and output types given by their own options
(`--token-embedding-type`, `--output-tensor-type`) skip this rule and abort instead.
"""

from gemma4q_kernels.ggml.types import QUANTIZABLE_TYPES, GGMLQuantizationType, block_size

# Names, because a type may be newer than the installed `gguf` package.
_BY_NAME = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
_SMALLEST_BLOCK = 32  # a type with blocks this small has nothing smaller to fall back to, except F16


class NoFallbackError(ValueError):
    """llama-quantize stops: it knows no substitute for this type."""


def is_legal(qtype: GGMLQuantizationType, row_length: int) -> bool:
    """Whether llama-quantize writes this type as asked."""
    return qtype in QUANTIZABLE_TYPES and row_length % block_size(qtype) == 0


def legal_types(row_length: int) -> tuple[GGMLQuantizationType, ...]:
    """Types that rows of this length can be stored in, smallest first."""
    return tuple(qtype for qtype in QUANTIZABLE_TYPES if is_legal(qtype, row_length))


def fallback(qtype: GGMLQuantizationType, row_length: int) -> GGMLQuantizationType:
    """The type that is written when `qtype` is asked for: itself where it is legal.

    Raises:
        NoFallbackError: the rule has no entry for this type (Q1_0, NVFP4) and llama-quantize stops.
    """
    if row_length % block_size(qtype) == 0:
        return qtype
    if qtype.name in _BY_NAME:
        substitute = GGMLQuantizationType[_BY_NAME[qtype.name]]
    elif block_size(qtype) <= _SMALLEST_BLOCK:
        substitute = qtype
    else:
        raise NoFallbackError(
            f"rows of {row_length} are not a multiple of {block_size(qtype)}, "
            f"and llama-quantize has no substitute for {qtype.name}"
        )
    return substitute if row_length % block_size(substitute) == 0 else GGMLQuantizationType.F16
