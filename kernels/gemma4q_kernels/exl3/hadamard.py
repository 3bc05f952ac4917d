"""The Walsh-Hadamard transform of blocks of 128, in natural (Sylvester) order, not normalised.

Stages run from neighbours (distance 1) to halves (distance 64), in the dtype of the input: additions in a fixed order,
so that every device returns the same bits.
"""

import torch

from gemma4q_kernels.exl3_layout import BLOCK

STAGES = tuple(1 << stage for stage in range(BLOCK.bit_length() - 1))


def transform(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Transform every block of 128 along `dim`, whose size is a multiple of 128: float of any shape to the same."""
    moved = x.movedim(dim, -1)
    shape = moved.shape
    for distance in STAGES:
        low, high = moved.reshape(*shape[:-1], -1, 2, distance).unbind(-2)
        moved = torch.stack((low + high, low - high), dim=-2)
    return moved.reshape(shape).movedim(-1, dim)
