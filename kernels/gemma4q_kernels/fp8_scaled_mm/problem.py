"""One FP8 multiplication: its sizes, and what is asked of its tensors."""

from dataclasses import dataclass

import torch

from gemma4q_kernels.fp8_scaled_mm.quantize import E4M3

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Problem:
    """[M, K] E4M3 x [N, K] E4M3 -> [M, N] of `out_dtype` on `device`."""

    device: torch.device
    m: int
    n: int
    k: int
    out_dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.out_dtype not in OUT_DTYPES:
            raise ValueError(f"out_dtype: got {self.out_dtype}, expected one of {OUT_DTYPES}")


def check_weight(w_q: torch.Tensor, weight_scale: torch.Tensor) -> tuple[int, int]:
    """N and K of a quantized weight.

    Raises:
        ValueError: not E4M3 [N, K] and float32 [N] (or [N, 1]) on one device.
    """
    if w_q.dtype != E4M3 or w_q.dim() != 2:
        raise ValueError(f"w_q: got {w_q.dtype} {tuple(w_q.shape)}, expected {E4M3} [N, K]")
    n, k = w_q.shape
    if weight_scale.dtype != torch.float32 or weight_scale.numel() != n or weight_scale.device != w_q.device:
        raise ValueError(
            f"weight_scale: got {weight_scale.dtype} {tuple(weight_scale.shape)} on {weight_scale.device}, "
            f"expected float32 [{n}] on {w_q.device}"
        )
    return n, k


def check_activations(x_q: torch.Tensor, k: int) -> int:
    """M of quantized activations.

    Raises:
        ValueError: not E4M3 [M, K].
    """
    if x_q.dtype != E4M3 or x_q.dim() != 2 or x_q.shape[1] != k:
        raise ValueError(f"x_q: got {x_q.dtype} {tuple(x_q.shape)}, expected {E4M3} [M, {k}]")
    return x_q.shape[0]


def check_scale(input_scale: torch.Tensor) -> None:
    """Raises ValueError where a static scale is not one float32 number."""
    if input_scale.dtype != torch.float32 or input_scale.numel() != 1:
        raise ValueError(
            f"input_scale: got {input_scale.dtype} {tuple(input_scale.shape)}, expected one float32 number"
        )


def check_bias(bias: torch.Tensor | None, n: int) -> None:
    """Raises ValueError where `bias` is not a float tensor [N]."""
    if bias is not None and (not bias.is_floating_point() or tuple(bias.shape) != (n,)):
        raise ValueError(f"bias: got {bias.dtype} {tuple(bias.shape)}, expected float [{n}]")
