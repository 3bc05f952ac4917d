"""Products of a few activations with an EXL3 weight on CPUs, decoded in registers: compiled by numba.

Lanes of a vector are 16 tiles side by side. Their words are transposed, so that the two words of a window are two
vectors and its shift is one number: nothing is looked up. A weight is used for up to 8 rows of activations and is gone.

Work is cut into pieces of 16 tiles by 1024 inputs. Each has its own sums, which are added in one order, so that
results do not depend on how many threads there are.

Not done: the rotations, which `cpu.py` does before and after.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemma4q_kernels.exl3.few_rows_column import QUAD, column, transpose
from gemma4q_kernels.exl3.reference import ring_positions, window_ends
from gemma4q_kernels.exl3.vectors import LANES, compiled, reader, write
from gemma4q_kernels.exl3_layout import TILE

# Rows that kernels are compiled for; fewer are filled with zeros.
_ROWS = (1, 4, 8)
# Rows of tiles of a piece.
_STRIP = 64
_read = reader(1)


def multiply(x: torch.Tensor, words: torch.Tensor, codebook: str) -> torch.Tensor:
    """x What, both transposed, by as many threads as torch has.

    Args:
        x: float32 [in, M].
        words: int32 [in/16, out/16, 8 K], contiguous: the trellis.

    Returns:
        float32 [out, M].
    """
    parts = [_product(group, words, codebook) for group in torch.split(x, _ROWS[-1], dim=1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@cache
def prepare(codebook: str) -> None:
    """Compile all that `multiply` needs for a codebook: 1.4 s for the first, 1.1 s for each other one."""
    words = torch.zeros((1, 1, TILE // 2), dtype=torch.int32)
    for rows in _ROWS:
        multiply(torch.zeros((TILE, rows)), words, codebook)


def _product(x: torch.Tensor, words: torch.Tensor, codebook: str) -> torch.Tensor:
    """`multiply` for at most 8 rows."""
    down, across, size = words.shape
    rows = next(each for each in _ROWS if each >= x.shape[1])
    filled = torch.nn.functional.pad(x, (0, rows - x.shape[1])).contiguous()
    sums = torch.zeros((-(-across // LANES), -(-down // _STRIP), rows, TILE, LANES))
    kernel, windows = _kernel(codebook, rows), _windows(2 * size)
    arrays = (words.view(-1).numpy(), windows, filled.view(-1).numpy(), sums.view(-1).numpy())

    def work(first: int, last: int) -> None:
        kernel(down, across, size, *arrays, np.empty((1 + size) * LANES, dtype=np.int32), first, last)

    _share(work, sums.shape[0] * sums.shape[1])
    columns = sums.sum(dim=1).permute(0, 3, 2, 1).reshape(-1, rows)
    return columns[: TILE * across, : x.shape[1]]


@cache
def _windows(width: int) -> np.ndarray:
    """Of every weight, column by column, what `few_rows_column.column` takes: int32 [16 * 16 * 2]."""
    ends = window_ends(width)[ring_positions().t()]
    table: np.ndarray = torch.stack(((ends - 1) // 32 * LANES, -ends % 32), dim=-1).int().flatten().numpy()
    return table


@cache
def _kernel(codebook: str, rows: int) -> Callable[..., Any]:
    """The sums of pieces `first` to `last` - 1, for so many rows of activations."""
    add_column = column(codebook, rows)

    def run(
        down: Any, across: Any, size: Any, words: Any, windows: Any, x: Any, sums: Any, room: Any, first: Any, last: Any
    ) -> None:
        strips = (down + _STRIP - 1) // _STRIP
        for piece in range(first, last):
            left, top = piece // strips * LANES, piece % strips * _STRIP
            # Where only 8 tiles are left, they are in both halves of a vector.
            half = LANES // 2 * size if left + LANES // 2 < across else 0
            for row in range(top, min(top + _STRIP, down)):
                start = (row * across + left) * size
                for word in range(0, size, QUAD):
                    transpose(words, start + word, start + word + half, size, room, (1 + word) * LANES)
                write(room, 0, _read(room, size * LANES))
                for each in range(TILE):
                    target = (piece * rows * TILE + each) * LANES
                    add_column(room, 0, windows, each * 2 * TILE, x, row * TILE * rows, sums, target)

    return compiled(run)


def _share(work: Callable[[int, int], None], count: int) -> None:
    """Call `work(first, last)` for parts of 0 .. count - 1, on as many threads as torch has."""
    threads = min(torch.get_num_threads(), count)
    if threads == 1:
        return work(0, count)
    bounds = [count * part // threads for part in range(threads + 1)]
    pool = _pool(torch.get_num_threads() - 1, os.getpid())
    first, *others = pairwise(bounds)
    running = [pool.submit(work, *part) for part in others]
    work(*first)
    for each in running:
        each.result()


@cache
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Threads that stay: 300 linears a token would start as many. A process that was forked gets its own."""
    cpus = allowed_cpus()

    def bind() -> None:
        if cpus:
            os.sched_setaffinity(0, cpus)

    return ThreadPoolExecutor(threads, "exl3", initializer=bind)


def allowed_cpus() -> set[int]:
    """CPUs for the threads of a pool; empty where the system knows no such bounds.

    New threads are bound as the one that starts them. vLLM binds each of OpenMP's threads, of which that one may be the
    first, to a CPU of its own. So these are the CPUs of all threads that are bound no less than the current one.
    """
    if not hasattr(os, "sched_getaffinity"):
        return set()
    own = os.sched_getaffinity(0)
    cpus = set(own)
    if len(own) < torch.get_num_threads():
        for thread in Path("/proc/self/task").iterdir():
            try:
                bounds = os.sched_getaffinity(int(thread.name))
            except ProcessLookupError:  # it has ended since
                continue
            cpus |= bounds if len(bounds) <= len(own) else set()
    return cpus
