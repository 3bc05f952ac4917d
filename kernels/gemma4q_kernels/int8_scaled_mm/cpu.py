"""INT8 W8A8 on a CPU: `torch._int_mm` for plain weights, vLLM's oneDNN operators for packed ones.

A packed weight is reordered once into the layout of the processor's dot-product instructions and runs about twice as
fast as `_int_mm` and as bfloat16. Both are exact where they are used: oneDNN sums in saturating 16 bits on x86 without
VNNI, where torch's `_int_mm` may do without it and vLLM's operators do not; each is asked. `_int_mm` also serves GPUs
(cuBLASLt, hipBLASLt) where its shape rules hold.
"""

import math
import weakref
from functools import cache

import torch

from gemma4q_kernels.int8_scaled_mm.problem import (
    Problem,
    check_activations,
    check_bias,
    check_weight,
    scale_accumulator,
)
from gemma4q_kernels.int8_scaled_mm.quantize import quantize_per_token as quantize_by_torch
from gemma4q_kernels.support import YES, Support, int_mm_is_exact, no, vllm_onednn

_QUANTIZED_BY_VLLM = (torch.bfloat16, torch.float16, torch.float32)
_PRIMITIVES_KEPT = 32  # oneDNN compiles one primitive for each M; vLLM keeps as many


def can_implement(problem: Problem) -> Support:
    """`torch._int_mm`: any shape on a CPU that does not saturate; on a GPU what cuBLASLt takes."""
    if problem.device.type == "cpu":
        return int_mm_is_exact()
    if problem.device.type != "cuda":
        return no(f"torch._int_mm has no kernel for device {problem.device}")
    if problem.m <= 16:
        return no(f"torch._int_mm on a GPU needs M > 16, got M = {problem.m}")
    if problem.n % 8 or problem.k % 8:
        return no(f"torch._int_mm on a GPU needs N and K in multiples of 8, got N = {problem.n}, K = {problem.k}")
    return YES


def scaled_mm(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """See `gemma4q_kernels.int8_scaled_mm.scaled_mm`."""
    # A weight stored as [K, N] is up to three times slower, and transposing it for one call slower still.
    if not w_q.t().is_contiguous():
        w_q = w_q.contiguous()
    accumulator = torch._int_mm(x_q.contiguous(), w_q.t())
    return scale_accumulator(accumulator, x_scale, w_scale, bias, out_dtype)


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule of `quantize.quantize_per_token`, by vLLM's operator where it is loaded: a pass in place of seven.

    To the bit, but for rows below 1e-10, which are zeros there and keep a smaller scale here. The operator would hide a
    NaN or an infinity, so values are summed first: a sum that is not finite goes the other way.
    """
    fits = x.device.type == "cpu" and x.dim() == 2 and x.numel() and x.dtype in _QUANTIZED_BY_VLLM
    if not fits or not hasattr(torch.ops._C, "dynamic_scaled_int8_quant"):
        return quantize_by_torch(x)
    if not math.isfinite(float(x.sum())):
        return quantize_by_torch(x)
    q, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0], 1, dtype=torch.float32)
    torch.ops._C.dynamic_scaled_int8_quant(q, x.contiguous(), scale, None)
    if not bool(scale.all()):  # without AVX-512 such rows are -128 everywhere
        q.masked_fill_(scale == 0, 0)
    return q, scale


class OneDnnWeight:
    """A weight reordered by oneDNN for one output dtype; the original tensor may be released.

    Not picklable: it owns memory outside torch, of the size of the weight, freed with the object.
    """

    def __init__(self, w_q: torch.Tensor, w_scale: torch.Tensor, out_dtype: torch.dtype) -> None:
        self.n, self.k = check_weight(w_q, w_scale)
        self.out_dtype = out_dtype
        self._scale = w_scale.reshape(-1).clone()  # the handler reads it at every call and does not own it
        address = torch.ops._C.create_onednn_scaled_mm_handler(
            w_q.contiguous().t(), self._scale, out_dtype, True, False, _PRIMITIVES_KEPT
        )
        # Not at exit: by then torch may be gone, and the memory goes with the process.
        weakref.finalize(self, torch.ops._C.release_dnnl_matmul_handler, address).atexit = False
        self._handler = torch.tensor(address, dtype=torch.int64)  # the form in which the operators take it

    @staticmethod
    def can_implement(problem: Problem) -> Support:
        """A CPU with vLLM's CPU build that does not saturate."""
        if problem.device.type != "cpu":
            return no(f"onednn runs on the CPU, got device {problem.device}")
        support = vllm_onednn()
        return _packed_is_exact() if support else support

    def scaled_mm(self, x_q: torch.Tensor, x_scale: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """int8 [M, K] and float32 [M, 1] -> [M, N] of `out_dtype`, to which the bias is rounded first."""
        m = check_activations(x_q, x_scale, self.k)
        check_bias(bias, self.n)
        out = torch.empty((m, self.n), dtype=self.out_dtype)
        if m:
            bias = None if bias is None else bias.to(self.out_dtype)
            torch.ops._C.onednn_scaled_mm(out, x_q.contiguous(), x_scale, None, None, bias, self._handler)
        return out

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """float [M, K], quantized per token, -> [M, N] of `out_dtype`."""
        return self.scaled_mm(*quantize_per_token(x), bias)


@cache
def _packed_is_exact() -> Support:
    """Whether vLLM's operators are exact on this CPU, by the largest values: its oneDNN is not torch's."""
    codes = torch.full((16, 64), 127, dtype=torch.int8)
    ones = torch.ones(16, 1, dtype=torch.float32)  # vLLM changes the default dtype
    product = OneDnnWeight(codes, ones, torch.float32).scaled_mm(codes, ones)
    if bool((product == 64 * 127 * 127).all()):
        return YES
    return no("vLLM's oneDNN saturates on this CPU (x86 without VNNI)")


class PlainWeight:
    """A weight kept as it is, for machines without vLLM's operators; same interface as `OneDnnWeight`."""

    def __init__(self, w_q: torch.Tensor, w_scale: torch.Tensor, out_dtype: torch.dtype) -> None:
        self.n, self.k = check_weight(w_q, w_scale)
        self.out_dtype = out_dtype
        self.w_q, self.w_scale = w_q.contiguous(), w_scale

    def scaled_mm(self, x_q: torch.Tensor, x_scale: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """int8 [M, K] and float32 [M, 1] -> [M, N] of `out_dtype`, by the best backend for plain weights."""
        from gemma4q_kernels.int8_scaled_mm import scaled_mm as any_backend

        return any_backend(x_q, x_scale, self.w_q, self.w_scale, bias=bias, out_dtype=self.out_dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """float [M, K], quantized per token, -> [M, N] of `out_dtype`."""
        return self.scaled_mm(*quantize_per_token(x), bias)
