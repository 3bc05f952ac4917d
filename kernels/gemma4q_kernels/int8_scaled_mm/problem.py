"""One INT8 W8A8 multiplication: its sizes, what is asked of its tensors, and its float32 epilogue."""

from dataclasses import dataclass

import torch

# |q| <= 128, so K products of int8 fit int32 up to here.
MAX_K = (2**31 - 1) // (128 * 128)
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Problem:
    """[M, K] int8 x [N, K] int8 -> [M, N] of `out_dtype` on `device`."""

    device: torch.device
    m: int
    n: int
    k: int
    out_dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.k > MAX_K:
            raise ValueError(f"K: got {self.k}, expected at most {MAX_K} (an int32 sum of int8 products)")
        if self.out_dtype not in OUT_DTYPES:
            raise ValueError(f"out_dtype: got {self.out_dtype}, expected one of {OUT_DTYPES}")


def check_weight(w_q: torch.Tensor, w_scale: torch.Tensor) -> tuple[int, int]:
    """N and K of a quantized weight.

    Raises:
        ValueError: not int8 [N, K] and float32 [N] (or [N, 1]) on one device.
    """
    if w_q.dtype != torch.int8 or w_q.dim() != 2:
        raise ValueError(f"w_q: got {w_q.dtype} {tuple(w_q.shape)}, expected int8 [N, K]")
    if w_scale.dtype != torch.float32 or w_scale.numel() != w_q.shape[0] or w_scale.device != w_q.device:
        raise ValueError(
            f"w_scale: got {w_scale.dtype} {tuple(w_scale.shape)} on {w_scale.device}, "
            f"expected float32 [{w_q.shape[0]}] on {w_q.device}"
        )
    return w_q.shape[0], w_q.shape[1]


def check_activations(x_q: torch.Tensor, x_scale: torch.Tensor, k: int) -> int:
    """M of quantized activations.

    Raises:
        ValueError: not int8 [M, K] and float32 [M, 1] (or [M]).
    """
    if x_q.dtype != torch.int8 or x_q.dim() != 2 or x_q.shape[1] != k:
        raise ValueError(f"x_q: got {x_q.dtype} {tuple(x_q.shape)}, expected int8 [M, {k}]")
    if x_scale.dtype != torch.float32 or x_scale.numel() != x_q.shape[0]:
        raise ValueError(f"x_scale: got {x_scale.dtype} {tuple(x_scale.shape)}, expected float32 [{x_q.shape[0]}, 1]")
    return x_q.shape[0]


def check_bias(bias: torch.Tensor | None, n: int) -> None:
    """Raises ValueError where `bias` is not a float tensor [N]."""
    if bias is not None and (not bias.is_floating_point() or tuple(bias.shape) != (n,)):
        raise ValueError(f"bias: got {bias.dtype} {tuple(bias.shape)}, expected float [{n}]")


def scale_accumulator(
    accumulator: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """int32 [M, N] * x_scale * w_scale + bias in float32, in this order, then cast."""
    out = accumulator.float().mul_(x_scale.reshape(-1, 1)).mul_(w_scale.reshape(1, -1))
    if bias is not None:
        out.add_(bias.float())
    return out.to(out_dtype)
