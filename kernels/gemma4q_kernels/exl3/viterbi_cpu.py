"""`viterbi.search` for CPUs: compiled by numba in 2 to 3 seconds, 16 states at a time, a thread for its share of tiles.

Per state: a subtraction, a multiply-add, a minimum. Two things keep it at that:

- Which of the candidates was the minimum is not noted. `minima` of all windows are kept (2^(16 - K) each: 32 MB a
  thread at K = 1, 4 MB at 4), and the way back compares the few candidates on its path again.
- The table of values lies in the order in which a step reads it: [16 kept values, highest bits, lane].

A state's own lower bits are the lanes, so minima of the step before are read once for 2^K neighbours: spread over the
lanes of a vector where K < 4. Measured on a core with AVX-512: 1.9 to 2.1 ms a tile at K = 3 to 7, at most 4.4
(benchmarks/exl3.py); plain torch takes 55 to 180. Needs numba: `pip install vllm-gemma4q[exl3]`.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch

from gemma4q_kernels.exl3.packing import STATE_BITS, WINDOWS, step_bits
from gemma4q_kernels.exl3.reference import values
from gemma4q_kernels.exl3.vectors import LANES, compiled, fill, reader, smaller, squared_difference_plus, write
from gemma4q_kernels.exl3.viterbi import STATES

_load, _read_2, _read_4, _read_8, _read_16 = (reader(times) for times in (1, 2, 4, 8, 16))
_INFINITY = np.float32(np.inf)


def search(tiles: torch.Tensor, width: int, codebook: str) -> torch.Tensor:
    """See `viterbi.search`: float32 [T, 256] on the CPU to int64 [T, 256]. Threads are as many as torch's."""
    bits = step_bits(width)[:2]
    tables = _tables(bits[0], bits[1], codebook)
    source = np.ascontiguousarray(tiles.numpy())
    paths = np.empty(source.shape, dtype=np.int64)
    workers = min(torch.get_num_threads(), len(source))

    def work(part: np.ndarray, path: np.ndarray) -> None:
        room = np.empty((WINDOWS + 1, STATES >> min(bits)), dtype=np.float32)
        _run(part, bits[0], bits[1], *tables, room, path)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, np.array_split(source, workers), np.array_split(paths, workers)))
    return torch.from_numpy(paths)


@cache
def _tables(first: int, second: int, codebook: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of states: as they are, and in the order of steps that leave `second` and `first` highest bits behind."""
    plain = values(torch.arange(STATES), codebook).float()
    ordered = [plain.view(1 << bits, -1, LANES).transpose(0, 1).flatten().numpy() for bits in (second, first)]
    return plain.numpy(), ordered[0], ordered[1]


def _stepper(read: Callable[..., Any]) -> Callable[..., Any]:
    """A step of windows that add `added` bits, where the next ones add `leaving`."""

    def step(minima: Any, added: Any, leaving: Any, values: Any, target: Any, result: Any) -> None:
        aim = fill(target)
        candidates, stride = 1 << leaving, STATES >> leaving >> added
        for group in range(STATES >> leaving >> 4):
            best = fill(_INFINITY)
            kept = (group * LANES) >> added
            start = group * candidates * LANES
            for highest in range(candidates):
                value = _load(values, start + highest * LANES)
                before = read(minima, highest * stride + kept)
                best = smaller(squared_difference_plus(value, aim, before), best)
            write(result, group * LANES, best)

    return compiled(step)


_step_2, _step_4, _step_8, _step_16 = (_stepper(read) for read in (_read_2, _read_4, _read_8, _read_16))


@compiled
def _step(minima: Any, added: Any, leaving: Any, values: Any, target: Any, result: Any) -> None:
    if added == 1:
        _step_2(minima, added, leaving, values, target, result)
    elif added == 2:
        _step_4(minima, added, leaving, values, target, result)
    elif added == 3:
        _step_8(minima, added, leaving, values, target, result)
    else:
        _step_16(minima, added, leaving, values, target, result)


@compiled
def _forward(tile: Any, turn: Any, first: Any, second: Any, after_even: Any, after_odd: Any, room: Any) -> None:
    """The minima that go on from every window, to the room behind those that enter it."""
    for t in range(0, WINDOWS, 2):
        _step(room[t], first, second, after_even, tile[(t + turn) % WINDOWS], room[t + 1])
        _step(room[t + 1], second, first, after_odd, tile[(t + 1 + turn) % WINDOWS], room[t + 2])


@compiled
def _backward(
    tile: Any, turn: Any, first: Any, second: Any, table: Any, room: Any, kept: Any, last: Any, path: Any
) -> Any:
    """From what the ring leaves behind, the way back to window `last`; returns what that keeps of the one before."""
    for t in range(WINDOWS - 1, last - 1, -1):
        added, leaving = (second, first) if t % 2 else (first, second)
        target, least, state = tile[(t + turn) % WINDOWS], _INFINITY, kept
        for highest in range(1 << leaving):
            candidate = (highest << (STATE_BITS - leaving)) | kept
            difference = table[candidate] - target
            cost = difference * difference + room[t, candidate >> added]
            if cost < least:
                least, state = cost, candidate
        path[t] = state
        kept = state >> added
    return kept


@compiled
def _run(
    tiles: Any, first: Any, second: Any, table: Any, after_even: Any, after_odd: Any, room: Any, paths: Any
) -> None:
    """The search for tiles whose windows add `first` and `second` bits in turn."""
    half, starts = WINDOWS // 2, STATES >> first
    for index in range(len(tiles)):
        tile, path = tiles[index], paths[index]
        room[0, :starts] = 0
        _forward(tile, half, first, second, after_even, after_odd, room)
        ends = _backward(tile, half, first, second, table, room, np.argmin(room[WINDOWS, :starts]), half, path)
        room[0, :starts] = _INFINITY
        room[0, ends] = 0
        _forward(tile, 0, first, second, after_even, after_odd, room)
        _backward(tile, 0, first, second, table, room, ends, 0, path)
