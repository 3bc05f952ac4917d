"""From paths to trellises: the inverse of `reference.states`.

A tile's windows are 16 bits each and overlap; the ring they lie on has 16 bits for each int16 of the tile. Unit u of
the ring, its bits [16 u, 16 u + 16), is read from two windows: the last one that ends inside it, and the first one that
reaches its end. Pairs of units are stored swapped, since they are little-endian words read from the highest bit.
"""

import torch

from gemma4q_kernels.exl3.format import check_codebook
from gemma4q_kernels.exl3.reference import states, window_ends
from gemma4q_kernels.exl3_layout import HALF_WIDTHS, TILE, WIDTHS

WINDOWS = TILE * TILE
STATE_BITS = 16


def width_of(bits: float, codebook: str) -> int:
    """int16 a tile at so many bits a weight.

    Raises:
        ValueError: a codebook that does not exist; bits that the format does not have, with this codebook.
    """
    check_codebook(codebook)
    widths = sorted(WIDTHS + HALF_WIDTHS) if codebook == "mul1" else list(WIDTHS)
    width = bits * TILE
    if width not in widths:
        known = ", ".join(f"{each / TILE:g}" for each in widths)
        raise ValueError(f"bits: got {bits:g}, expected one of {known} with codebook {codebook!r}")
    return int(width)


def step_bits(width: int) -> list[int]:
    """How many bits each of the 256 windows adds to the one before it; half rates alternate between two numbers."""
    ends = window_ends(width)
    return torch.diff(ends, prepend=ends.new_zeros(1)).tolist()


def pack(path: torch.Tensor, width: int) -> torch.Tensor:
    """Store the windows of tiles.

    Args:
        path: states in ring order, integers [.., 256] from 0 to 65535 (a 16-bit dtype may hold them as its bits).
        width: int16 a tile, 16 K.

    Returns:
        int16 [.., 16 K], so that `reference.states` returns `path`.

    Raises:
        ValueError: another shape, dtype or width; no tiles; windows that disagree where they overlap, which no ring
            can hold.
    """
    if path.dtype.is_floating_point or path.shape[-1:] != (WINDOWS,) or not path.numel():
        raise ValueError(f"states: got {path.dtype} {tuple(path.shape)}, expected integers [.., {WINDOWS}]")
    if width not in WIDTHS + HALF_WIDTHS:
        raise ValueError(f"width: got {width} int16 a tile, expected one of {sorted(WIDTHS + HALF_WIDTHS)}")
    windows = path.long() & 0xFFFF
    units = _units(windows, width).view(*windows.shape[:-1], -1, 2).flip(-1).flatten(-2)
    trellis = ((units ^ 0x8000) - 0x8000).to(torch.int16)
    if not torch.equal(states(trellis), windows):
        raise ValueError("states: windows disagree where they overlap: not a tail-biting path")
    return trellis


def _units(windows: torch.Tensor, width: int) -> torch.Tensor:
    """Ring bits 16 at a time: int64 [.., 256] to int64 [.., 16 K]."""
    ends = window_ends(width, windows.device)
    unit_ends = torch.arange(1, width + 1, device=windows.device) * STATE_BITS
    inside = torch.searchsorted(ends, unit_ends, right=True) - 1
    behind = torch.searchsorted(ends, unit_ends)
    missing, beyond = unit_ends - ends[inside], ends[behind] - unit_ends
    low = (windows[..., behind] >> beyond) & ((1 << missing) - 1)
    units: torch.Tensor = ((windows[..., inside] << missing) | low) & 0xFFFF
    return units
