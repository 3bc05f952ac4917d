"""INT8 W8A8 matrix multiplication: int8 weights with a scale a row, int8 activations with a scale a token.

    out[m, n] = sum_k x_q[m, k] * w_q[n, k]  *  x_scale[m]  *  w_scale[n]  (+ bias[n])

The sum is an exact int32, the rest float32, cast at the end. Weights are [N, K], as checkpoints store them.

    quantize.py   the two roundings            reference.py  oracle
    dispatch.py   which backend, and why       cpu.py        torch._int_mm, oneDNN through vLLM
    problem.py    sizes, checks, epilogue      triton.py     GPUs
    cpu_few_rows.py   AMX, up to 64 rows       tiles.py      its launch parameters, read from configs/

Not done here: static activation scales, zero points, sums over K split among ranks.
"""

import torch

from gemma4q_kernels.int8_scaled_mm.cpu import OneDnnWeight, PlainWeight
from gemma4q_kernels.int8_scaled_mm.cpu_few_rows import MAX_ROWS, FewRowsWeight
from gemma4q_kernels.int8_scaled_mm.dispatch import BACKENDS, Choice, backend_module, choose
from gemma4q_kernels.int8_scaled_mm.problem import Problem, check_activations, check_bias, check_weight
from gemma4q_kernels.int8_scaled_mm.quantize import quantize_per_channel, quantize_per_token

__all__ = [
    "BACKENDS",
    "Choice",
    "choose",
    "linear",
    "pack",
    "pack_linear",
    "quantize_per_channel",
    "quantize_per_token",
    "scaled_mm",
]


def scaled_mm(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> torch.Tensor:
    """Multiply quantized activations with a quantized weight.

    Args:
        x_q, x_scale: int8 [M, K], float32 [M, 1].
        w_q, w_scale: int8 [N, K], float32 [N].
        bias: float [N], added in float32.
        out_dtype: bfloat16, float16 or float32.
        backend: "auto" or one of `BACKENDS`.

    Returns:
        [M, N] of `out_dtype`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a backend that cannot run this.
    """
    n, k = check_weight(w_q, w_scale)
    m = check_activations(x_q, x_scale, k)
    check_bias(bias, n)
    choice = choose(w_q.device, m, n, k, out_dtype, backend)
    if not m or not n:
        return torch.empty((m, n), dtype=out_dtype, device=w_q.device)
    out: torch.Tensor = backend_module(choice.name).scaled_mm(x_q, x_scale, w_q, w_scale, bias, out_dtype)
    return out


def linear(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Quantize activations per token and multiply: [.., K] float -> [.., N] of the dtype of `x`.

    Raises:
        ValueError: as `scaled_mm`.
    """
    n, k = check_weight(w_q, w_scale)
    if not x.is_floating_point() or x.shape[-1:] != (k,):
        raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, expected float [.., {k}]")
    rows = x.reshape(-1, k)
    module = backend_module(choose(w_q.device, len(rows), n, k, x.dtype, backend).name)
    x_q, x_scale = getattr(module, "quantize_per_token", quantize_per_token)(rows)
    out = scaled_mm(x_q, x_scale, w_q, w_scale, bias=bias, out_dtype=x.dtype, backend=backend)
    return out.reshape(*x.shape[:-1], n)


def pack(
    w_q: torch.Tensor, w_scale: torch.Tensor, out_dtype: torch.dtype = torch.bfloat16, backend: str = "auto"
) -> OneDnnWeight | PlainWeight:
    """A weight in the layout that runs fastest on its device, with methods `scaled_mm` and `linear`.

    Args:
        w_q, w_scale: int8 [N, K], float32 [N]; may be released afterwards.
        backend: "onednn" (CPU, needs vLLM's CPU build), "plain", or "auto": the first that runs.

    Raises:
        ValueError: shapes or dtypes that do not fit; "onednn" where it cannot run (with the reason).
    """
    if backend not in ("auto", "onednn", "plain"):
        raise ValueError(f"backend: got {backend!r}, expected 'auto', 'onednn' or 'plain'")
    n, k = check_weight(w_q, w_scale)
    if backend != "plain":
        support = OneDnnWeight.can_implement(Problem(w_q.device, 1, n, k, out_dtype))
        if support:
            return OneDnnWeight(w_q, w_scale, out_dtype)
        if backend == "onednn":
            raise ValueError(f"int8_scaled_mm.pack N={n} K={k}: onednn refuses: {support.reason}")
    return PlainWeight(w_q, w_scale, out_dtype)


def pack_linear(
    w_q: torch.Tensor, w_scale: torch.Tensor, out_dtype: torch.dtype = torch.bfloat16, *, rows: int
) -> FewRowsWeight | OneDnnWeight | PlainWeight:
    """A weight in the layout that runs fastest where most calls bring `rows` tokens; any number is right.

    Args:
        w_q, w_scale: int8 [N, K], float32 [N]; may be released afterwards.

    Returns:
        An object whose `linear(x, bias)` multiplies float [M, K] to [M, N] of `out_dtype`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    n, k = check_weight(w_q, w_scale)
    if rows <= MAX_ROWS and FewRowsWeight.can_implement(Problem(w_q.device, rows, n, k, out_dtype)):
        return FewRowsWeight(w_q, w_scale)
    return pack(w_q, w_scale, out_dtype)
