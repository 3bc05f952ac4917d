"""The search for the best trellis of a tile, by its definition: torch, any device.

A path is a state of 16 bits for each of the 256 windows of a tile. Window t keeps the lower bits of the state before
it and adds k new ones, so of all states that share their lower 16 - k bits only the cheapest can go on: `minima`, one
number for each value of the bits that are kept. A step costs one squared error for each of 65536 states.

Rings are closed in two passes: the first starts and ends anywhere, on the ring turned by half; what it passes
through opposite its own ends is where the second starts and ends. Not done: trying every start, of which there are
2^(16 - K). On the few normally distributed tiles where we did, the best of all was the same at 4 and 8 bits, and up to
0.7% better at 2 and 3.

All searches (`viterbi_cpu.py`, Triton) have the signature of `search` here, and compute in float32.
"""

from collections.abc import Sequence

import torch

from gemma4q_kernels.exl3.packing import STATE_BITS, WINDOWS, step_bits
from gemma4q_kernels.exl3.reference import values

STATES = 1 << STATE_BITS
# Costs of 65536 states, at once: 64 MB and some temporary copies.
_TILES_AT_ONCE = 256


def search(tiles: torch.Tensor, width: int, codebook: str) -> torch.Tensor:
    """The cheapest tail-biting paths, as far as two passes find them.

    Args:
        tiles: float32 [T, 256], T > 0, finite, in ring order, in units of the codebook's values.
        width: int16 a tile, 16 K.
        codebook: "3inst", "mcg" or "mul1".

    Returns:
        States in ring order, int64 [T, 256].
    """
    bits = step_bits(width)
    table = values(torch.arange(STATES, device=tiles.device), codebook).float()
    return torch.cat([_tail_biting(part, bits, table) for part in torch.split(tiles, _TILES_AT_ONCE)])


def _tail_biting(tiles: torch.Tensor, bits: Sequence[int], table: torch.Tensor) -> torch.Tensor:
    half = WINDOWS // 2  # even: `bits` turned by half are themselves
    before_first = cheapest_path(tiles.roll(-half, dims=1), bits, table, None)[:, half - 1]
    return cheapest_path(tiles, bits, table, before_first & _kept(bits[0]))


def _kept(bits: int) -> int:
    """The mask of what a window keeps of the state before it."""
    return (STATES >> bits) - 1


def cheapest_path(
    tiles: torch.Tensor, bits: Sequence[int], table: torch.Tensor, ends: torch.Tensor | None
) -> torch.Tensor:
    """The path with the least sum of squared errors.

    Args:
        tiles: float32 [T, 256].
        bits: how many each of the 256 windows adds.
        table: float32 [65536], values of states.
        ends: what the first window keeps, and the last one leaves: int64 [T], below 2^(16 - bits[0]); None: anything.

    Returns:
        int64 [T, 256].
    """
    count = len(tiles)
    minima = tiles.new_zeros((count, STATES >> bits[0]))
    if ends is not None:
        minima.fill_(torch.inf).scatter_(1, ends.unsqueeze(1), 0)
    choices = []
    for t, added in enumerate(bits):
        leaving = bits[(t + 1) % WINDOWS]
        costs = (table - tiles[:, t].unsqueeze(1)).square_()
        costs.view(count, -1, 1 << added).add_(minima.unsqueeze(2))
        minima, choice = costs.view(count, 1 << leaving, -1).min(dim=1)
        choices.append(choice.to(torch.uint8))
    kept = minima.argmin(dim=1) if ends is None else ends
    path = torch.empty((count, WINDOWS), dtype=torch.int64, device=tiles.device)
    for t in reversed(range(WINDOWS)):
        highest = choices[t].gather(1, kept.unsqueeze(1)).squeeze(1).long()
        path[:, t] = (highest << (STATE_BITS - bits[(t + 1) % WINDOWS])) | kept
        kept = path[:, t] >> bits[t]
    return path
