"""How far next-token distributions over a whole vocabulary are from a reference's, position by position.

Files hold float32 log-probabilities [positions, vocabulary], row by row: 1 MB a position of Gemma's 262,144 tokens.
They are read a few rows at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vllm_gemma4q.errors import InputError

_VALUES_AT_ONCE = 1 << 22
_VALUE_BYTES = 4


@dataclass(frozen=True)
class Divergence:
    """KL(reference || other) in nats a position; `error` is one standard error of the mean.

    Attributes:
        same_top: share of positions whose most likely token is the same, 0 to 1.
    """

    mean_kld: float
    error: float
    median_kld: float
    p99_kld: float
    p999_kld: float
    max_kld: float
    same_top: float
    positions: int


def compare(reference: Path, other: Path, vocabulary: int, span: tuple[int, int] | None = None) -> Divergence:
    """Two files over the same positions: all of them, or rows `span` (start, stop).

    Raises:
        InputError: sizes that do not fit the vocabulary or each other, or a log-probability that is not a number.
    """
    rows = _rows(reference, vocabulary)
    if (found := _rows(other, vocabulary)) != rows or rows < 2:
        raise InputError(f"{other.name}: got {found} positions, expected the {rows} of {reference.name}, at least 2")
    start, stop = span or (0, rows)
    klds, same = [], 0
    pairs = zip(*(_blocks(path, rows, vocabulary, start, stop) for path in (reference, other)), strict=True)
    for p, q in pairs:
        for name, block in ((reference.name, p), (other.name, q)):
            if np.isnan(block).any():
                raise InputError(f"{name}: a log-probability is not a number")
        klds.append(_kld(p, q))
        same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
    return _summary(np.concatenate(klds), same)


def _summary(kld: npt.NDArray[np.float64], same: int) -> Divergence:
    with np.errstate(invalid="ignore"):  # one infinite divergence makes the mean infinite, and its error unknown
        median, p99, p999 = np.quantile(kld, (0.5, 0.99, 0.999))
        error = float(kld.std(ddof=1)) / math.sqrt(len(kld))
    return Divergence(
        mean_kld=float(kld.mean()),
        error=error,
        median_kld=float(median),
        p99_kld=float(p99),
        p999_kld=float(p999),
        max_kld=float(kld.max()),
        same_top=same / len(kld),
        positions=len(kld),
    )


def _kld(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Float64 [rows, vocabulary] each; a token that p excludes adds nothing. Rounding can leave -1e-8: 0 then."""
    with np.errstate(invalid="ignore"):
        terms = np.where(p > -np.inf, np.exp(p) * (p - q), 0.0)
    kld: npt.NDArray[np.float64] = np.maximum(terms.sum(axis=1), 0.0)
    return kld


def _rows(path: Path, vocabulary: int) -> int:
    rows, rest = divmod(path.stat().st_size, _VALUE_BYTES * vocabulary)
    if rest:
        raise InputError(f"{path.name}: {path.stat().st_size} bytes, expected rows of {vocabulary} float32")
    return rows


def _blocks(path: Path, rows: int, vocabulary: int, start: int, stop: int) -> Iterator[npt.NDArray[np.float64]]:
    step = max(1, _VALUES_AT_ONCE // vocabulary)
    table = np.memmap(path, np.float32, "r", shape=(rows, vocabulary))
    for first in range(start, stop, step):
        yield table[first : min(first + step, stop)].astype(np.float64)
