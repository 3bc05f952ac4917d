"""The goals of `exl3_h200.py`: pure functions from measured seconds to figures beside their goals."""

from h200_goals import Figure

from vllm_gemma4q.benchmark.shapes import Shape

# Share of copy bandwidth at 4 bits and few rows; seconds of a dense weight over those of a copy.
OF_COPY, GOAL_M, GOAL_WIDTH = 0.55, 8, 64
TIMES_COPY = 1.5


def linear_goals(shape: Shape, width: int, m: int, seconds: float, bf16: float, bandwidth: float) -> list[Figure]:
    """Bytes that have to be read and written over those that a copy moves, and speed over a dense weight.

    Args:
        width: int16 a tile: 16 times the bits a weight.
        bf16: seconds of the same in bfloat16.
        bandwidth: bytes a second of a copy.
    """
    where = f"{shape.name} [{shape.n}, {shape.k}], {width / 16:g} bits, M = {m}"
    n_bytes = shape.n * shape.k * width / 128 + 2 * m * (shape.n + shape.k)
    goal = OF_COPY if m <= GOAL_M and width == GOAL_WIDTH else None
    share = Figure(f"{where}: share of copy bandwidth", n_bytes / seconds / bandwidth, goal)
    return [share, Figure(f"{where}: speed over bf16", bf16 / seconds)]


def reconstruct_goals(shape: Shape, width: int, seconds: float, copied: float) -> list[Figure]:
    """Time that is allowed over the time it takes.

    Args:
        copied: seconds of a copy of the dense weight.
    """
    where = f"{shape.name} [{shape.n}, {shape.k}], {width / 16:g} bits"
    what = f"{where}: {TIMES_COPY:g} x time of a bf16 copy over time of reconstruct"
    return [Figure(what, TIMES_COPY * copied / seconds, 1.0 if width == GOAL_WIDTH else None)]
