"""Sums over samples: of what enters a linear, and of what a router chooses.

Sums of a few rows, as many as a processor's cache holds, are taken in float32 and added up in float64, on the device of
the activations. A value's bin in the
histogram is its exponent and first three bits behind the point, which in BF16 and F32 is a shift of its bits; the same
2048 counts tell whether anything was infinite or not a number.
"""

from collections.abc import Sequence

import numpy as np
import torch

from vllm_gemma4q.calibration.experts import Routed
from vllm_gemma4q.calibration.hessian import HalfHessian
from vllm_gemma4q.calibration.statistics import (
    BINS_PER_OCTAVE,
    HIGHEST_OCTAVE,
    LOWEST_OCTAVE,
    Array,
    Inputs,
    Routing,
    as_arrays,
)
from vllm_gemma4q.errors import InputError

_VALUES_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 24}
_RAW_BINS = 2048
_RAW_NOT_FINITE = 255 * BINS_PER_OCTAVE
_BIAS = 127


class InputSums:
    """Of `n` matrices with `width` input channels each: one linear, or all experts of a layer."""

    def __init__(self, name: str, n: int, width: int, device: torch.device, hessian: bool = False):
        self._name = name
        self._rows_at_once = max(1, _VALUES_AT_ONCE[device.type] // width)
        self._absmax = torch.zeros(n, width, device=device)
        self._sum = torch.zeros(n, width, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._sum)
        self._count = [0] * n
        self._raw = torch.zeros(n, _RAW_BINS, dtype=torch.int64, device=device)
        self._hessian = HalfHessian(width, device) if hessian else None

    def add(self, rows: torch.Tensor) -> None:
        """Add what entered the one matrix, [rows, width], any float dtype."""
        self._add(rows, 0)
        if self._hessian is not None:
            self._hessian.add(rows)

    def add_grouped(self, rows: torch.Tensor, counts: Sequence[int]) -> None:
        """Add rows that are sorted by matrix, `counts` of each."""
        for matrix, part in enumerate(torch.split(rows, list(counts))):
            if len(part):
                self._add(part, matrix)
        if self._hessian is not None:
            self._hessian.add(rows)

    def _add(self, rows: torch.Tensor, matrix: int) -> None:
        self._count[matrix] += len(rows)
        for block in torch.split(rows.detach(), self._rows_at_once):
            values = block.float()
            most = torch.maximum(values.amax(dim=0), -values.amin(dim=0))  # torch.aminmax takes three times as long
            torch.maximum(self._absmax[matrix], most, out=self._absmax[matrix])
            self._sum[matrix] += values.sum(dim=0)
            self._raw[matrix] += torch.bincount(_raw_bins(block), minlength=_RAW_BINS)
            self._squares[matrix] += values.square().sum(dim=0)

    def arrays(self) -> dict[str, Array]:
        """By their names in the file, the Hessian as its half. Raises InputError: see `result`."""
        half = None if self._hessian is None else self._hessian.values.cpu().numpy()
        return as_arrays(self._name, self.result(), half)

    def result(self) -> Inputs:
        """Raises InputError: something that is not finite entered."""
        raw = self._raw.cpu().numpy()
        if raw[:, _RAW_NOT_FINITE:].any():
            raise InputError(f"module {self._name}: its input is not finite; try --dtype float32")
        return Inputs(
            self._absmax.cpu().numpy(),
            self._sum.cpu().numpy(),
            self._squares.cpu().numpy(),
            np.array(self._count, np.int64),
            _fold(raw),
        )


class RoutingSums:
    """Of one MoE layer: see `statistics.Routing`."""

    def __init__(self, n_experts: int, n_samples: int):
        self._sums = {name: torch.zeros(n_experts, dtype=torch.float64) for name in _SUMMED}
        self._count = torch.zeros(n_experts, dtype=torch.int64)
        self._max = torch.zeros(n_experts)
        self._sample_count = torch.zeros(n_samples, n_experts, dtype=torch.int32)
        self._sample_norm = torch.zeros(n_samples, n_experts)

    def add(
        self,
        sample: int,
        probabilities: torch.Tensor,
        index: torch.Tensor,
        gates: torch.Tensor,
        norms: torch.Tensor,
        contributions: torch.Tensor,
    ) -> None:
        """Add one sample of T tokens.

        Args:
            probabilities: [T, E], the router's.
            index: [T, K], experts chosen; gates: [T, K]; norms: [T, K] of their outputs.
            contributions: [T], EASY-EP's share of the token.
        """
        n_experts = len(self._count)
        experts, norm, gate = index.reshape(-1).cpu(), _flat(norms), _flat(gates)
        share = _flat(contributions).repeat_interleave(index.shape[1])

        def sums(values: torch.Tensor) -> torch.Tensor:
            return torch.bincount(experts, weights=values, minlength=n_experts)

        counts = torch.bincount(experts, minlength=n_experts)
        self._count += counts
        self._sums["probability_sum"] += probabilities.double().sum(dim=0).cpu()
        self._sums["gate_sum"] += sums(gate)
        self._sums["norm_sum"] += sums(norm)
        self._sums["norm_square_sum"] += sums(norm.square())
        self._sums["gated_norm_sum"] += sums(gate * norm)
        self._sums["contribution_sum"] += sums(share * gate * norm)
        self._max.scatter_reduce_(0, experts, norm.float(), "amax")
        self._sample_count[sample] = counts.int()
        self._sample_norm[sample] = sums((gate * norm).square()).sqrt().float()

    def result(self) -> Routing:
        return Routing(
            count=self._count.numpy(),
            norm_max=self._max.numpy(),
            sample_count=self._sample_count.numpy(),
            sample_gated_norm=self._sample_norm.numpy(),
            **{name: values.numpy() for name, values in self._sums.items()},
        )


class ExpertSums:
    """What enters `gate_up_proj` and `down_proj` of all experts of one layer."""

    def __init__(self, gate_up: InputSums, down: InputSums):
        self._gate_up, self._down = gate_up, down

    def add(self, routed: Routed) -> None:
        self._gate_up.add_grouped(routed.entered, routed.counts)
        self._down.add_grouped(routed.inner, routed.counts)


_SUMMED = ("probability_sum", "gate_sum", "norm_sum", "norm_square_sum", "gated_norm_sum", "contribution_sum")


def _flat(values: torch.Tensor) -> torch.Tensor:
    return values.detach().double().cpu().reshape(-1)


def _raw_bins(values: torch.Tensor) -> torch.Tensor:
    """Exponent times 8 plus the first three bits behind the point, int32 [n]."""
    if values.dtype == torch.bfloat16:
        return (values.reshape(-1).view(torch.int16) & 0x7FFF) >> 4
    return (values.float().reshape(-1).view(torch.int32) & 0x7FFFFFFF) >> 20


def _fold(raw: Array) -> Array:
    """[n, 2048] of all exponents to [n, 322]: what is too small into the first bin, too large into the last."""
    first, last = (BINS_PER_OCTAVE * (octave + _BIAS) for octave in (LOWEST_OCTAVE, HIGHEST_OCTAVE))
    inside = raw[:, first:last]
    below, above = raw[:, :first].sum(axis=1, keepdims=True), raw[:, last:].sum(axis=1, keepdims=True)
    return np.concatenate([below, inside, above], axis=1)
