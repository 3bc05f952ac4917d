"""The Hessian of every linear, mean of x x^T, from a statistics file; read one at a time, for they fill disks.

q, k and v of a layer share one, and so do gate and up; all experts of a layer share one for gate and up, and one for
down, over the tokens routed to any of them.
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from vllm_gemma4q.calibration.statistics import Statistics, read_statistics
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.linears import Linear

_REMEDY = "expected what gemma4q calibrate --hessians wrote for this model (or --no-hessian)"


class Hessians:
    """Those of a statistics file, after a look at its header.

    Raises:
        InputError: one of `linears` has none, or one of another size, or no token reached it.
    """

    def __init__(self, statistics: Path, linears: Iterable[Linear]):
        self.statistics: Statistics = read_statistics(statistics)
        self._counts: dict[str, int] = {}
        for linear in linears:
            name, _ = linear.inputs_among(self.statistics.modules)
            if name not in self._counts:
                self._counts[name] = self._check(name, linear.shape[1])

    def of(self, linear: Linear) -> torch.Tensor:
        """float32 [in, in]."""
        name, _ = linear.inputs_among(self.statistics.modules)
        found = self.statistics.hessian(name)
        assert found is not None, name
        return torch.from_numpy(found).div_(self._counts[name])

    def _check(self, name: str, width: int) -> int:
        where = f"{self.statistics.path.name}: Hessian of {name}"
        shape = self.statistics.hessian_shape(name)
        if shape is None:
            raise InputError(f"{where}: missing, {_REMEDY}")
        if shape != (width, width):
            raise InputError(f"{where}: got {list(shape)}, expected {[width, width]}")
        count = int(self.statistics.inputs(name).count.sum())
        if not count:
            raise InputError(f"{where}: no token reached it; calibrate with more text")
        return count
