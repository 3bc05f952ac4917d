"""Types that a backend of llama.cpp computes with natively and fast: `plan --backend` allows only these.

From the sources of b11434: cuda, and hip which shares its code, are the types with matrix-matrix kernels of their own
(`ggml_cuda_should_use_mmq`), all others being expanded to F16 first; vulkan is what its `supports_op` takes; cpu leaves
out the types that look up a codebook for every few weights, which no vector unit does fast.
"""

from collections.abc import Mapping

from gemma4q_kernels.ggml import FLOAT_TYPES, QUANTIZABLE_TYPES, GGMLQuantizationType

_BY_CODEBOOK = ("IQ1_", "IQ2_", "IQ3_")
_NOT_ON_CUDA = frozenset({"IQ1_M", "TQ1_0", "TQ2_0"})

BACKENDS: Mapping[str, frozenset[GGMLQuantizationType]] = {
    "cpu": frozenset(qtype for qtype in QUANTIZABLE_TYPES if not qtype.name.startswith(_BY_CODEBOOK)),
    "cuda": frozenset(qtype for qtype in QUANTIZABLE_TYPES if qtype.name not in _NOT_ON_CUDA),
    "hip": frozenset(qtype for qtype in QUANTIZABLE_TYPES if qtype.name not in _NOT_ON_CUDA),
    "vulkan": frozenset(QUANTIZABLE_TYPES),
}

assert all(types >= FLOAT_TYPES for types in BACKENDS.values())
