"""The goals of `int8_h200.py`: pure functions from measured seconds to figures beside their goals."""

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_gemma4q.benchmark.shapes import Shape

OF_FP8, OF_CUBLASLT = 0.80, 1.0  # speed at M >= 1024
DECODE_M, DECODE_FACTOR, DECODE_LAUNCH = 16, 1.05, 1.5e-6
MOE_SECONDS, MOE_TOPS = {1: 40e-6, 32: 170e-6}, {4096: 600.0}
OF_COPY, OF_UNFUSED = 0.85, 2.0


@dataclass(frozen=True)
class Figure:
    """One measured value; `goal` is what it has to reach (None: only reported). Larger is better."""

    what: str
    value: float
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none."""
        return None if self.goal is None else self.value >= self.goal

    def __str__(self) -> str:
        beside = "" if self.goal is None else f" (goal {self.goal:.2f}: {'met' if self.met else 'missed'})"
        return f"{self.what}: {self.value:.3f}{beside}"


def linear_goals(shape: Shape, m: int, seconds: Mapping[str, float], bandwidth: float) -> list[Figure]:
    """Speed of ours over each peer's; in decoding, the time that is allowed over the time it takes.

    Args:
        seconds: by contender, "gemma4q" among them.
        bandwidth: bytes a second of a copy.
    """
    ours = seconds["gemma4q"]
    where = f"{shape.name} [{shape.n}, {shape.k}] M = {m}"
    goals = {"fp8": OF_FP8, "cublaslt": OF_CUBLASLT} if m >= 1024 else {}
    figures = [
        Figure(f"{where}: speed over {name}", theirs / ours, goals.get(name))
        for name, theirs in seconds.items()
        if name != "gemma4q"
    ]
    if m <= DECODE_M:
        n_bytes = shape.n * shape.k + m * shape.k + 2 * m * shape.n
        allowed = DECODE_FACTOR * n_bytes / bandwidth + DECODE_LAUNCH
        figures.append(Figure(f"{where}: time allowed at copy bandwidth over time", allowed / ours, 1.0))
    else:
        figures.append(Figure(f"{where}: TOPS", 2 * m * shape.n * shape.k / ours / 1e12))
    return figures


def experts_goals(tokens: int, top_k: int, hidden: int, width: int, seconds: float) -> list[Figure]:
    """Time allowed over time for few tokens, TOPS for many."""
    tops = 2 * tokens * top_k * 3 * width * hidden / seconds / 1e12
    figures = [Figure(f"experts, {tokens} tokens: TOPS", tops, MOE_TOPS.get(tokens))]
    if tokens in MOE_SECONDS:
        allowed = MOE_SECONDS[tokens]
        what = f"experts, {tokens} tokens: {allowed * 1e6:.0f} us over time"
        figures.append(Figure(what, allowed / seconds, 1.0))
    return figures


def fused_goals(name: str, n_bytes: int, seconds: float, unfused: float, bandwidth: float) -> list[Figure]:
    """Share of copy bandwidth, and speed over the same in separate steps."""
    return [
        Figure(f"{name}: share of copy bandwidth", n_bytes / seconds / bandwidth, OF_COPY),
        Figure(f"{name}: speed over separate steps", unfused / seconds, OF_UNFUSED),
    ]
