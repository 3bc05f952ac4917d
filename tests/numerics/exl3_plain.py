"""EXL3 once more, in plain Python from the format's description: lists, strings of bits and `struct`; no torch.

Shares nothing with the package, and goes the other way wherever there are two: from windows to places in the tile, and
Hadamard signs from the parity of common bits.
"""

import struct
from collections.abc import Sequence


def half(bits: int) -> float:
    """The float16 of 16 bits."""
    number: float = struct.unpack("<e", struct.pack("<H", bits))[0]
    return number


def round_half(number: float) -> float:
    """To the nearest float16, ties to even."""
    rounded: float = struct.unpack("<e", struct.pack("<e", number))[0]
    return rounded


def round_single(number: float) -> float:
    """To the nearest float32, ties to even."""
    rounded: float = struct.unpack("<f", struct.pack("<f", number))[0]
    return rounded


def value(state: int, codebook: str) -> float:
    """What a codebook makes of a state."""
    if codebook == "mul1":
        product = struct.pack("<I", state * 0x83DCD12D % 2**32)
        return round_half((1024 + sum(product)) * half(0x1EEE) + half(0xC931))  # exact before it is rounded
    x = state * 89226354 + 64248484 if codebook == "3inst" else state * 0xCBAC1FED
    low, high = struct.unpack("<HH", struct.pack("<I", (x % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60))
    return round_half(half(low) + half(high))


def tile(packed: Sequence[int], codebook: str) -> list[list[float]]:
    """16 rows of 16 weights of the 16 K int16 of a tile."""
    words = struct.unpack(f"<{len(packed) // 2}I", struct.pack(f"<{len(packed)}h", *packed))
    ring = "".join(f"{word:032b}" for word in words)
    assert len(ring) == 16 * len(packed)
    weights = [[0.0] * 16 for _ in range(16)]
    for t in range(256):
        end = (t + 1) * len(packed) // 16
        state = (
            int((ring + ring)[len(ring) + end - 16 : len(ring) + end], 2) if end < 16 else int(ring[end - 16 : end], 2)
        )
        row = 2 * ((t >> 3) & 3) + (t & 1) + 8 * ((t >> 1) & 1)
        weights[row][(t >> 5) + 8 * ((t >> 2) & 1)] = value(state, codebook)
    return weights


def inner(trellis: Sequence[Sequence[Sequence[int]]], codebook: str) -> list[list[float]]:
    """What [in][out], of a trellis [in/16][out/16][16 K]."""
    rows: list[list[float]] = []
    for packed in trellis:
        tiles = [tile(one, codebook) for one in packed]
        rows += [[weight for one in tiles for weight in one[row]] for row in range(16)]
    return rows


def signs(packed: Sequence[int], size: int) -> list[float]:
    """Signs of old files."""
    return [-1.0 if packed[i // 16] % 2**16 >> i % 16 & 1 else 1.0 for i in range(size)]


def rotated(vector: Sequence[float]) -> list[float]:
    """The transform of one block of 128, neighbours first, each addition rounded to float32."""
    done = list(vector)
    for bit in range(7):
        other = 1 << bit
        done = [
            round_single(done[i ^ other] - done[i] if i & other else done[i] + done[i ^ other])
            for i in range(len(done))
        ]
    return done


def transposed(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    """Rows for columns."""
    return [list(row) for row in zip(*matrix, strict=True)]


def rotated_rows(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    """Every block of 128 of every row."""
    return [
        [number for start in range(0, len(row), 128) for number in rotated(row[start : start + 128])] for row in matrix
    ]


def dense(weights: Sequence[Sequence[float]], suh: Sequence[float], svh: Sequence[float]) -> list[list[float]]:
    """W [in][out] in float32 of What: along in, along out, times suh / 128, times svh."""
    both = rotated_rows(transposed(rotated_rows(transposed(weights))))
    return [
        [round_single(round_single(number * (row_scale / 128)) * scale) for number, scale in zip(row, svh, strict=True)]
        for row, row_scale in zip(both, suh, strict=True)
    ]


def hadamard() -> list[list[float]]:
    """The matrix of 128, not normalised: -1 where row and column share an odd number of bits."""
    return [[-1.0 if (row & column).bit_count() % 2 else 1.0 for column in range(128)] for row in range(128)]
