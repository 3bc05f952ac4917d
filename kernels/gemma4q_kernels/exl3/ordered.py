"""Products and Cholesky factors of float32 on CPUs, whose bits do not depend on how many threads there are.

A BLAS divides its sums by the number of threads, and so rounds them otherwise on a machine with more of them, or where
several processes share one. Here parts of a fixed size are computed by one thread each, and as many at once as torch
has threads. On other devices this is what torch does.

Not done: the same bits on processors with other instructions.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

_COLUMNS = 256
_BLOCK = 512
_SMALL = 1 << 24  # multiplications, about a millisecond


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """float32 [m, k] x [k, n] -> [m, n]."""
    if left.device.type != "cpu":
        return left @ right
    columns = right.shape[1]
    result = left.new_empty((left.shape[0], columns))
    small = left.shape[0] * left.shape[1] * columns <= _SMALL
    step = max(1, columns if small else _COLUMNS)

    def part(start: int) -> None:
        torch.mm(left, right[:, start : start + step], out=result[:, start : start + step])

    _each(part, range(0, columns, step))
    return result


def cholesky(matrix: torch.Tensor) -> torch.Tensor | None:
    """The lower factor of a symmetric float32 [n, n], in its place where that can be; None where there is none."""
    if matrix.device.type != "cpu":
        root, failed = torch.linalg.cholesky_ex(matrix)
        return None if int(failed) else root
    size = len(matrix)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        if not _factor(matrix[start:stop, start:stop]):
            return None
        _eliminate(matrix, start, stop)
    return matrix.tril_()


def _factor(block: torch.Tensor) -> bool:
    """Put a block's own factor in its place; whether there is one."""
    failed = False

    def factor(_: int) -> None:
        nonlocal failed
        found, info = torch.linalg.cholesky_ex(block)
        failed = bool(info)
        block.copy_(found)

    _each(factor, [0])
    return not failed


def _eliminate(root: torch.Tensor, start: int, stop: int) -> None:
    """Divide what lies below a block of columns by it, and take its products from what lies to the right."""
    top, below = root[start:stop, start:stop].mT, range(stop, len(root), _BLOCK)

    def divide(first: int) -> None:
        rows = root[first : first + _BLOCK, start:stop]
        rows.copy_(torch.linalg.solve_triangular(top, rows, upper=True, left=False))

    def subtract(first: int) -> None:
        last = min(first + _BLOCK, len(root))
        root[first:last, stop:last].addmm_(root[first:last, start:stop], root[stop:last, start:stop].mT, alpha=-1)

    _each(divide, below)
    _each(subtract, below)


def _each(work: Callable[[int], None], parts: Sequence[int]) -> None:
    """Call `work` for each part, in threads that torch does not divide any further."""
    threads = torch.get_num_threads()
    # Of this thread and of new ones; MKL has a number for each thread, which is why they set it, too.
    torch.set_num_threads(1)
    try:
        if len(parts) < 2 or threads == 1:
            for part in parts:
                work(part)
            return
        with ThreadPoolExecutor(min(threads, len(parts)), "exl3", torch.set_num_threads, (1,)) as pool:
            list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)
