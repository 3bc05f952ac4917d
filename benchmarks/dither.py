"""Moving dequantized weights off the grid of their old quantization.

A dequantized tensor lies on the grid that it was quantized to, and quantizing it again with that type, or one whose
grid is finer, loses nothing: a comparison of types on it would be misleading. Uniform noise of half a step to either
side spreads the weights over the cells of that grid, as the original weights were.

The step of a weight is the distance of neighbouring values in its block (Q8_0, Q5_0: 32 weights; Q4_K: 32 of 256; Q6_K:
16 of 256): the dequantized block with all codes 1 less the same with all codes 0, whatever its scales. Blocks with a
scale of zero have no step and stay zero.
"""

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, dequantize

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Where the codes of a block are, where their lowest bits are, and these bits set.
_CODES = {
    GGMLQuantizationType.Q8_0: (slice(2, 34), slice(2, 34), 0x01),
    GGMLQuantizationType.Q5_0: (slice(2, 22), slice(6, 22), 0x11),
    GGMLQuantizationType.Q4_K: (slice(16, 144), slice(16, 144), 0x11),
    GGMLQuantizationType.Q6_K: (slice(0, 192), slice(0, 128), 0x11),
}
_BLOCK_BYTES = {
    GGMLQuantizationType.Q8_0: 34,
    GGMLQuantizationType.Q5_0: 22,
    GGMLQuantizationType.Q4_K: 144,
    GGMLQuantizationType.Q6_K: 210,
}


def steps(rows: Bytes, qtype: GGMLQuantizationType) -> Floats:
    """Step of every weight.

    Args:
        rows: [rows, bytes of a row].
        qtype: Q8_0, Q5_0, Q4_K or Q6_K.

    Returns:
        float32 [rows, row length], never negative.
    """
    codes, lowest, ones = _CODES[qtype]
    all_zero = rows.reshape(-1, _BLOCK_BYTES[qtype]).copy()
    all_zero[:, codes] = 0
    all_one = all_zero.copy()
    all_one[:, lowest] = ones
    return np.asarray(np.abs(_dequantize(all_one, rows, qtype) - _dequantize(all_zero, rows, qtype)))


def dither(rows: Bytes, qtype: GGMLQuantizationType, generator: np.random.Generator) -> Floats:
    """Dequantized weights plus noise, uniform over one step, centred on zero: float32 [rows, row length]."""
    step = steps(rows, qtype)
    noise = generator.random(step.shape, dtype=np.float32) - np.float32(0.5)
    return np.asarray(dequantize(rows, qtype) + noise * step, np.float32)


def _dequantize(blocks: Bytes, rows: Bytes, qtype: GGMLQuantizationType) -> Floats:
    return np.asarray(dequantize(blocks.reshape(rows.shape), qtype), np.float32)
