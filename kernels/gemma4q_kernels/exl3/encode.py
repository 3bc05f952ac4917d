"""The best trellis for given tiles: which search runs, and what it found as the format stores it.

A search is `search(tiles float32 [T, 256] in ring order, width, codebook) -> states, integers [T, 256]`:

    numba       `viterbi_cpu.py`: CPUs with numba, about 2 ms a tile and core
    triton      `viterbi_triton.py`: GPUs
    reference   `viterbi.py`: torch anywhere, a hundred times slower than numba
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from gemma4q_kernels.dispatch import Choice
from gemma4q_kernels.exl3.packing import WINDOWS, pack, width_of
from gemma4q_kernels.exl3.reference import ring_positions, values
from gemma4q_kernels.exl3_layout import TILE
from gemma4q_kernels.support import YES, Support, no, triton_support

Search = Callable[[torch.Tensor, int, str], torch.Tensor]
_SEARCHES = {"numba": "viterbi_cpu", "triton": "viterbi_triton", "reference": "viterbi"}
ENCODERS = tuple(_SEARCHES)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tiles as stored, and what they decode to.

    Attributes:
        trellis: int16 [T, 16 K].
        values: float32 [T, 16, 16], every one exact in float16.
    """

    trellis: torch.Tensor
    values: torch.Tensor


def encode(tiles: torch.Tensor, bits: float, codebook: str, *, backend: str = "auto") -> Encoded:
    """Tail-biting paths with the least squared error, by `viterbi.search`'s two passes.

    Args:
        tiles: float32 [T, 16, 16], one or more, [in, out] as in the weight, in units of the codebook: its values have
            a standard deviation of 1.244 (mul1: 1.000) and end at 4 (3.5); tiles are encoded best with 1.1 times that
            at 1 bit, and less the more bits, down to 0.75 times at 8.
        bits: 1 to 8 a weight; 1.5, 2.5 and 3.5 with codebook mul1 only.
        codebook: "3inst", "mcg" or "mul1".
        backend: "auto" or one of `ENCODERS`.

    Raises:
        ValueError: shapes, dtypes, bits or names that do not fit; numbers that are not finite; a backend that cannot
            run here.
    """
    width = width_of(bits, codebook)
    if tiles.dtype != torch.float32 or tiles.shape[1:] != (TILE, TILE) or not len(tiles):
        raise ValueError(f"tiles: got {tiles.dtype} {tuple(tiles.shape)}, expected torch.float32 [T, {TILE}, {TILE}]")
    if not bool(tiles.isfinite().all()):
        raise ValueError("tiles: got NaN or infinity, expected finite numbers")
    search = search_of(choose_encoder(tiles.device, backend).name)
    place = ring_positions(tiles.device).flatten()
    ring = torch.empty((len(tiles), WINDOWS), dtype=torch.float32, device=tiles.device)
    ring[:, place] = tiles.detach().flatten(1)
    path = search(ring, width, codebook).long()
    return Encoded(pack(path, width), values(path, codebook).float()[:, place].view_as(tiles))


def choose_encoder(device: torch.device | str, requested: str = "auto") -> Choice:
    """Which search encodes tiles on a device, and why not the ones tried before it.

    Args:
        requested: "auto", or one of `ENCODERS`, which is then chosen or refused and never replaced.

    Raises:
        ValueError: unknown backend; a requested one that cannot run here.
    """
    if requested != "auto" and requested not in _SEARCHES:
        raise ValueError(f"backend: got {requested!r}, expected 'auto' or one of {list(ENCODERS)}")
    device = torch.device(device)
    fast = "numba" if device.type == "cpu" else "triton"  # Triton's interpreter is only requested
    refusals: list[tuple[str, str]] = []
    for name in (fast, "reference") if requested == "auto" else (requested,):
        support = _supports(name, device)
        if support:
            return Choice(name, tuple(refusals))
        refusals.append((name, support.reason))
    raise ValueError(f"backend: {requested} cannot encode on {device}: {refusals[0][1]}")


def search_of(name: str) -> Search:
    """The search of a backend; numba or Triton is imported now."""
    search: Search = import_module(f"gemma4q_kernels.exl3.{_SEARCHES[name]}").search
    return search


def _supports(name: str, device: torch.device) -> Support:
    if name == "reference":
        return YES
    if name == "triton":
        return triton_support(device)
    if device.type != "cpu":
        return no(f"numba compiles for CPUs, got device {device}")
    if importlib.util.find_spec("numba") is None:
        return no("numba is not installed (pip install 'vllm-gemma4q[exl3]')")
    return YES
