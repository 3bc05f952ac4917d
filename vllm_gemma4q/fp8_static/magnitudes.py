"""How often each magnitude occurs in a weight or an activation: all that choosing a scale needs to know.

A BF16 or F16 magnitude has 15 bits, so a weight's distribution is exact in 32768 counters, however large the
weight. F32 weights are counted rounded to BF16; their absmax is exact. An activation's comes from a statistics file,
whose bins are an eighth of an octave: values are taken to lie evenly in a bin, at `_POINTS` places.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_gemma4q.calibration.statistics import histogram_edges
from vllm_gemma4q.fp8_static.e4m3 import round_trip
from vllm_gemma4q.fp8_static.format import MAX, MIN_SUBNORMAL

N_PATTERNS = 1 << 15
_MAGNITUDE = N_PATTERNS - 1
_POINTS = 16

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """A distribution of |x|.

    Attributes:
        values: float64 [n], ascending.
        counts: float64 [n], how often; fractions where a bin was divided.
        absmax: the largest, exactly.
    """

    values: Array
    counts: Array
    absmax: float

    def squared_error(self, scale: float) -> float:
        """Sum of squared differences between the values and what E4M3 with this scale makes of them."""
        values = torch.from_numpy(self.values)
        rounded = round_trip(values, scale).double()
        return float((torch.from_numpy(self.counts) * (values - rounded).square()).sum())

    def clipped(self, scale: float) -> float:
        """How many lie above the largest representable magnitude."""
        # Not those that a rounded quotient puts there: a scale of absmax / 448 clips nothing.
        return float(self.counts[self.values > MAX * scale * (1 + 2.0**-20)].sum())

    def underflowed(self, scale: float) -> float:
        """How many are not zero and become zero: half the smallest subnormal rounds to even."""
        return float(self.counts[(self.values > 0) & (self.values <= MIN_SUBNORMAL / 2 * scale)].sum())

    def percentile(self, share: float) -> float:
        """The smallest magnitude that at least `share` of all values do not exceed; 0 where there are none."""
        total = np.cumsum(self.counts)
        if not len(total) or total[-1] <= 0:
            return 0.0
        return float(min(self.values[np.searchsorted(total, share * total[-1])], self.absmax))


class WeightCounter:
    """Counts a weight's magnitudes, block by block.

    Args:
        dtype: torch.bfloat16, float16 or float32, of all blocks.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
        self._counts = torch.zeros(N_PATTERNS, dtype=torch.int64)
        self._absmax = 0.0

    def add(self, block: torch.Tensor) -> None:
        """Count a block of any shape.

        Raises:
            ValueError: NaN or infinity.
        """
        if not block.numel():
            return
        absmax = float(block.abs().amax()) if block.dtype == torch.float32 else 0.0
        self._absmax = max(self._absmax, absmax)
        patterns = block.to(self._dtype).view(torch.int16).bitwise_and(_MAGNITUDE).flatten()
        # int32: torch counts int16 values three times slower.
        counts = torch.bincount(patterns.int(), minlength=N_PATTERNS)
        if bool(counts[_infinity(self._dtype) :].any()) or not np.isfinite(absmax):
            raise ValueError("got NaN or infinity, expected finite weights")
        self._counts += counts

    def magnitudes(self) -> Magnitudes:
        """What has been counted so far."""
        found = self._counts.nonzero().flatten()
        values = found.to(torch.int16).view(self._dtype).double().numpy()
        absmax = self._absmax or (float(values[-1]) if len(values) else 0.0)
        return Magnitudes(values, self._counts[found].double().numpy(), absmax)


def _infinity(dtype: torch.dtype) -> int:
    """Bit pattern of infinity, above which all are NaN."""
    return 0x7C00 if dtype == torch.float16 else 0x7F80


def from_histogram(histogram: Array, absmax: float) -> Magnitudes:
    """The distribution behind one row of a statistics file's `input_histogram`.

    Args:
        histogram: int64 [322].
        absmax: the largest magnitude of all that was counted; bins reach no further.
    """
    edges = np.concatenate([[0.0], histogram_edges()])
    upper = np.append(edges[1:], np.inf)
    used = histogram.nonzero()[0]
    low, high = edges[used], np.maximum(np.minimum(upper[used], absmax), edges[used])
    places = (np.arange(_POINTS) + 0.5) / _POINTS
    values = low[:, None] + (high - low)[:, None] * places
    counts = np.repeat(histogram[used] / _POINTS, _POINTS)
    return Magnitudes(values.ravel(), counts, absmax)
