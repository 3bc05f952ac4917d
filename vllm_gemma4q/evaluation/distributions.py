"""How far next-token distributions over a whole vocabulary are from a reference's, position by position.

Files hold float32 log-probabilities [positions, vocabulary], row by row: 1 MB a position of Gemma's 262,144 tokens.
They are read a few rows at a time.

Vocabularies may end differently, by rows of padding that one file format keeps and another does not. Then both models
are compared over the tokens that both have, the wider one's probabilities divided by what these hold of the whole:
refused where that is less than 99.9%, since tokens that are used are no padding.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vllm_gemma4q.errors import InputError

_VALUES_AT_ONCE = 1 << 22
VALUE_BYTES = 4
_MOST_PADDING = 1e-3


_Rows = npt.NDArray[np.float64]


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


def compare(
    reference: Path,
    other: Path,
    vocabulary: int,
    span: tuple[int, int] | None = None,
    *,
    other_vocabulary: int | None = None,
    floor: float = -math.inf,
) -> Divergence:
    """Two files over the same positions: all of them, or rows `span` (start, stop).

    Args:
        vocabulary: of the reference, and of the other unless `other_vocabulary` says otherwise.
        floor: natural logarithm; tokens that the reference holds to be no likelier add nothing. Of a file that does
            not tell such tokens apart.

    Raises:
        InputError: sizes that do not fit the vocabulary or each other, a log-probability that is not a number, or
            vocabularies that differ by more than padding.
    """
    tables = _Table(reference, vocabulary), _Table(other, other_vocabulary or vocabulary)
    rows = tables[0].rows
    if (found := tables[1].rows) != rows or rows < 2:
        raise InputError(f"{other.name}: got {found} positions, expected the {rows} of {reference.name}, at least 2")
    start, stop = span or (0, rows)
    common = min(table.vocabulary for table in tables)
    klds, same = [], 0
    for p, q in zip(*(table.blocks(start, stop, common) for table in tables), strict=True):
        klds.append(_kld(p, q, floor))
        same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
    return _summary(np.concatenate(klds), same)


def _summary(kld: _Rows, same: int) -> Divergence:
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


def _kld(p: _Rows, q: _Rows, floor: float) -> _Rows:
    """Float64 [rows, vocabulary] each; a token that p excludes adds nothing. Rounding can leave -1e-8: 0 then."""
    with np.errstate(invalid="ignore"):
        terms = np.where(p > floor, np.exp(p) * (p - q), 0.0)
    kld: _Rows = np.maximum(terms.sum(axis=1), 0.0)
    return kld


class _Table:
    """A file's rows."""

    def __init__(self, path: Path, vocabulary: int) -> None:
        size = path.stat().st_size
        self.rows, rest = divmod(size, VALUE_BYTES * vocabulary)
        if rest:
            raise InputError(f"{path.name}: {size} bytes, expected rows of {vocabulary} float32")
        self.path, self.vocabulary = path, vocabulary

    def blocks(self, start: int, stop: int, common: int) -> Iterator[_Rows]:
        """Rows `start` to `stop` over the first `common` tokens, a few at a time."""
        step = max(1, _VALUES_AT_ONCE // common)
        table = np.memmap(self.path, np.float32, "r", shape=(self.rows, self.vocabulary))
        padding = 0.0
        for first in range(start, stop, step):
            block = table[first : min(first + step, stop)].astype(np.float64)
            if np.isnan(block).any():
                raise InputError(f"{self.path.name}: a log-probability is not a number")
            beyond = np.exp(block[:, common:]).sum(axis=1)
            padding += float(beyond.sum())
            yield block[:, :common] - np.log1p(-beyond)[:, None]
        if padding > _MOST_PADDING * (stop - start):
            raise InputError(
                f"{self.path.name}: tokens {common} to {self.vocabulary - 1}, which the other model lacks, hold "
                f"{padding / (stop - start):.2%} of the probability, expected padding with at most {_MOST_PADDING:.1%}"
            )
