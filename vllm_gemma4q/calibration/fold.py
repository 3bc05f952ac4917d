"""Sums of the parts of all samples, brought together into those of all: always in the order of the samples.

Parts are the same however many processes there are, and each is summed on its own, so that the result is the same too.
"""

from itertools import pairwise

import numpy as np

from vllm_gemma4q.calibration.hessian import Mirrored
from vllm_gemma4q.calibration.statistics import HESSIAN, Array

N_PARTS = 16  # at most: more would give more processes work, but each loads the layer and has sums to add up
_LARGEST = frozenset({"input_absmax", "norm_max"})
_BY_SAMPLE = frozenset({"sample_count", "sample_gated_norm"})


def divided(n_samples: int) -> list[range]:
    """Samples of each part."""
    n_parts = min(N_PARTS, n_samples)
    ends = [n_samples * part // n_parts for part in range(n_parts + 1)]
    return [range(start, stop) for start, stop in pairwise(ends)]


def fold(total: dict[str, Array], part: dict[str, Array]) -> None:
    """Bring the next part's sums, by their names in the file, into `total`, which may take arrays over."""
    for name, array in part.items():
        field = name.rpartition(".")[2]
        if name not in total:
            total[name] = array
        elif field in _BY_SAMPLE:
            total[name] = np.concatenate([total[name], array])
        elif field in _LARGEST:
            np.maximum(total[name], array, out=total[name])
        else:
            total[name] += array


def whole(total: dict[str, Array]) -> dict[str, Array | Mirrored]:
    """The same with the Hessians' other halves."""
    return {
        name: Mirrored(array, total[f"{name.removesuffix(HESSIAN)}input_sum"].shape[-1])
        if name.endswith(f".{HESSIAN}")
        else array
        for name, array in total.items()
    }
