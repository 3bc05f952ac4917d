"""`viterbi.search` for CPUs: a few hundred lines of machine code by numba, 16 states at a time, a tile a thread.

Per state: a subtraction, a multiply-add, a minimum. Two things keep it at that:

- Which of the candidates was the minimum is not noted. `minima` of all windows are kept (2^(16 - K) each: 32 MB a
  thread at K = 1, 4 MB at 4), and the way back compares the few candidates on its path again.
- The table of values lies in the order in which a step reads it: [16 kept values, highest bits, lane].

A state's own lower bits are the lanes, so minima of the step before are read once for 2^K neighbours: spread over the
lanes of a vector where K < 4. Needs numba: `pip install vllm-gemma4q[exl3]`.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch

from gemma4q_kernels.exl3.packing import STATE_BITS, WINDOWS, step_bits
from gemma4q_kernels.exl3.reference import values
from gemma4q_kernels.exl3.vectors import LANES, compiled, fill, reader, smaller, squared_difference_plus, write
from gemma4q_kernels.exl3.viterbi import STATES

_load = reader(1)
_INFINITY = np.float32(np.inf)


def search(tiles: torch.Tensor, width: int, codebook: str) -> torch.Tensor:
    """See `viterbi.search`: float32 [T, 256] on the CPU to int64 [T, 256]. Threads are as many as torch's."""
    bits = step_bits(width)
    run = _searcher(bits[0], bits[1])
    tables = _tables(bits[0], bits[1], codebook)
    source = np.ascontiguousarray(tiles.numpy(), dtype=np.float32)
    paths = np.empty(source.shape, dtype=np.int64)
    workers = min(torch.get_num_threads(), len(source))

    def work(first: int) -> None:
        room = np.empty((WINDOWS + 1, STATES >> min(bits[:2])), dtype=np.float32)
        run(source[first::workers], *tables, room, paths[first::workers])

    if workers == 1:
        work(0)
    else:
        with ThreadPoolExecutor(workers) as pool:
            _wait(pool.map(work, range(workers)))
    return torch.from_numpy(paths)


def _wait(results: Iterable[None]) -> None:
    for _ in results:
        pass


@cache
def _tables(first: int, second: int, codebook: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of states: as they are, and in the order of steps that leave `second` and `first` highest bits behind."""
    plain = values(torch.arange(STATES), codebook).float()
    ordered = [plain.view(1 << bits, -1, LANES).transpose(0, 1).flatten().numpy() for bits in (second, first)]
    return plain.numpy(), ordered[0], ordered[1]


def _stepper(added: int, leaving: int) -> Callable[..., Any]:
    """A step of windows that add so many bits, where the next ones add `leaving`."""
    read = reader(min(1 << added, LANES))
    groups, candidates, stride = STATES >> leaving >> 4, 1 << leaving, STATES >> leaving >> added

    def step(minima: Any, values: Any, target: Any, result: Any) -> None:
        aim = fill(target)
        for group in range(groups):
            best = fill(_INFINITY)
            kept = (group * LANES) >> added
            for highest in range(candidates):
                value = _load(values, (group * candidates + highest) * LANES)
                before = read(minima, highest * stride + kept)
                best = smaller(squared_difference_plus(value, aim, before), best)
            write(result, group * LANES, best)

    return compiled(step)


@cache
def _searcher(first: int, second: int) -> Callable[..., Any]:
    """The search for tiles whose windows add `first` and `second` bits in turn, compiled when it is first called."""
    even, odd = _stepper(first, second), _stepper(second, first)
    half = WINDOWS // 2

    def forward(tile: Any, turn: int, after_even: Any, after_odd: Any, room: Any) -> None:
        for t in range(0, WINDOWS, 2):
            even(room[t], after_even, tile[(t + turn) % WINDOWS], room[t + 1])
            odd(room[t + 1], after_odd, tile[(t + 1 + turn) % WINDOWS], room[t + 2])

    def backward(tile: Any, turn: int, table: Any, room: Any, kept: Any, last: int, path: Any) -> Any:
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

    forward, backward = compiled(forward), compiled(backward)

    def run(tiles: Any, table: Any, after_even: Any, after_odd: Any, room: Any, paths: Any) -> None:
        starts = STATES >> first
        for index in range(len(tiles)):
            tile, path = tiles[index], paths[index]
            room[0, :starts] = 0
            forward(tile, half, after_even, after_odd, room)
            ends = backward(tile, half, table, room, np.argmin(room[WINDOWS, :starts]), half, path)
            room[0, :starts] = _INFINITY
            room[0, ends] = 0
            forward(tile, 0, after_even, after_odd, room)
            backward(tile, 0, table, room, ends, 0, path)

    return compiled(run)
