"""One fused step: its sizes, and what is asked of its tensors."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from gemma4q_kernels.grouped_mm.activation import ACTIVATIONS

# How often a value is rounded to the dtype of the input on its way: the index in this tuple.
ROUNDINGS = ("none", "once", "twice")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Problem:
    """[rows, width_in] of `dtype` -> int8 [rows, width_out] on `device`."""

    device: torch.device
    rows: int
    width_in: int
    width_out: int
    dtype: torch.dtype


class Normed(NamedTuple):
    """q int8 [T, H], scale float32 [T, 1], and the sum [T, H] that was normed, None where nothing was added."""

    q: torch.Tensor
    scale: torch.Tensor
    residual: torch.Tensor | None


def check_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    input_weight: torch.Tensor | None,
    rounding: str,
) -> None:
    """Raises ValueError where the arguments of `rms_norm_quantize` do not fit each other."""
    _check_matrix("x", x)
    _check_rounding(rounding)
    for name, vector in (("weight", weight), ("input_weight", input_weight)):
        if vector is not None and (vector.shape != x.shape[1:] or not vector.is_floating_point()):
            raise ValueError(f"{name}: got {vector.dtype} {tuple(vector.shape)}, expected float [{x.shape[1]}]")
    if residual is None and input_weight is not None:
        raise ValueError("input_weight: got a norm in front of an addition, but no residual to add")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual: got {residual.dtype} {tuple(residual.shape)}, expected {x.dtype} {tuple(x.shape)} as x has"
        )


def check_gated(gate_up: torch.Tensor, activation: str, rounding: str) -> None:
    """Raises ValueError where the arguments of `gated_quantize` do not fit."""
    _check_matrix("gate_up", gate_up)
    _check_rounding(rounding)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: got {gate_up.shape[1]} columns, expected an even number: gate, then up")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {list(ACTIVATIONS)}")


def _check_matrix(name: str, tensor: torch.Tensor) -> None:
    if tensor.dim() != 2 or tensor.dtype not in _DTYPES or not tensor.shape[1]:
        raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, expected a float matrix with columns")


def _check_rounding(rounding: str) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: got {rounding!r}, expected one of {list(ROUNDINGS)}")
