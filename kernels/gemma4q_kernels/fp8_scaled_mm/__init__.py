"""FP8 W8A8 matrix multiplication: E4M3 weights with a scale a row, E4M3 activations with one static scale.

    x_q       = E4M3(clamp(x / input_scale, -448, 448))
    out[m, n] = sum_k x_q[m, k] * w_q[n, k]  *  input_scale  *  weight_scale[n]  (+ bias[n])

Products of two E4M3 numbers are exact in float32; sums are float32 (reference: float64), and the result is cast
once, at the end. So every device computes the same function of the same codes, with FP8 instructions or without.
Weights are [N, K], as checkpoints store them. Scales of fused linears stay apart: each row has its own.

    quantize.py   rounding activations, decoding E4M3    reference.py  oracle
    dispatch.py   which backend, and why                 cpu.py        dequantized a block of rows at a time
    problem.py    sizes, checks                          triton.py     GPUs, with FP8 instructions or without
    experts.py    mixture of experts, any device

Not done here: scales by token or by block, E5M2, the FNUZ variants of AMD's MI300.
"""

import torch

from gemma4q_kernels.fp8_scaled_mm.dispatch import BACKENDS, Choice, backend_module, choose
from gemma4q_kernels.fp8_scaled_mm.experts import moe_fp8
from gemma4q_kernels.fp8_scaled_mm.problem import check_activations, check_bias, check_scale, check_weight
from gemma4q_kernels.fp8_scaled_mm.quantize import E4M3, E4M3_MAX, quantize_static

__all__ = ["BACKENDS", "E4M3", "E4M3_MAX", "Choice", "choose", "linear", "moe_fp8", "quantize_static", "scaled_mm"]


def scaled_mm(
    x_q: torch.Tensor,
    input_scale: torch.Tensor,
    w_q: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> torch.Tensor:
    """Multiply quantized activations with a quantized weight.

    Args:
        x_q: E4M3 [M, K].
        input_scale: float32, one element.
        w_q, weight_scale: E4M3 [N, K]; float32 [N] or [N, 1].
        bias: float [N], added in float32.
        out_dtype: bfloat16, float16 or float32.
        backend: "auto" or one of `BACKENDS`.

    Returns:
        [M, N] of `out_dtype`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a backend that cannot run this.
    """
    n, k = check_weight(w_q, weight_scale)
    m = check_activations(x_q, k)
    check_scale(input_scale)
    check_bias(bias, n)
    choice = choose(w_q.device, m, n, k, out_dtype, backend)
    if not m or not n:
        return torch.empty((m, n), dtype=out_dtype, device=w_q.device)
    out: torch.Tensor = backend_module(choice.name).scaled_mm(x_q, input_scale, w_q, weight_scale, bias, out_dtype)
    return out


def linear(
    x: torch.Tensor,
    w_q: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Quantize activations and multiply: [.., K] float -> [.., N] of the dtype of `x`.

    Raises:
        ValueError: as `scaled_mm`.
    """
    n, k = check_weight(w_q, weight_scale)
    if not x.is_floating_point() or x.shape[-1:] != (k,):
        raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, expected float [.., {k}]")
    x_q = quantize_static(x.reshape(-1, k), input_scale)
    out = scaled_mm(x_q, input_scale, w_q, weight_scale, bias=bias, out_dtype=x.dtype, backend=backend)
    return out.reshape(*x.shape[:-1], n)
