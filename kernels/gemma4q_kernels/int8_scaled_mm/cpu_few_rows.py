"""INT8 W8A8 for few rows on a CPU with AMX: vLLM's SGLang operator, which quantizes tokens on its way.

Beside oneDNN, on two cores: 1.05 to 1.5 times as fast up to 32 rows, level at 64, down to 0.65 of its speed at 256. A
weight has one layout, so `pack_linear` asks how many rows it will meet.

Tokens are quantized by the rule of `quantize.quantize_per_token` in another order of float32 operations: codes at a tie
may differ by one, the integer product is exact.
"""

import math

import torch

from gemma4q_kernels.int8_scaled_mm.problem import Problem, check_bias, check_weight
from gemma4q_kernels.support import YES, Support, no, vllm_onednn

MAX_ROWS = 64
_BLOCK = 32


class FewRowsWeight:
    """A weight in the layout of AMX tiles; the original tensor may be released."""

    def __init__(self, w_q: torch.Tensor, w_scale: torch.Tensor) -> None:
        self.n, self.k = check_weight(w_q, w_scale)
        self.out_dtype = torch.bfloat16
        self._scale = w_scale.reshape(-1).clone()
        self._packed = torch.ops._C.convert_weight_packed(w_q.contiguous())

    @staticmethod
    def can_implement(problem: Problem) -> Support:
        """A CPU with AMX and vLLM's CPU build, bfloat16, N and K in multiples of 32: others end the process there."""
        if problem.device.type != "cpu" or not torch.cpu._is_amx_tile_supported():
            return no(f"needs a CPU with AMX, got device {problem.device}")
        if problem.out_dtype != torch.bfloat16:
            return no(f"needs bfloat16, got {problem.out_dtype}")
        if problem.n % _BLOCK or problem.k % _BLOCK:
            return no(f"needs N and K in multiples of {_BLOCK}, got N = {problem.n}, K = {problem.k}")
        if not (support := vllm_onednn()):
            return support
        return YES if hasattr(torch.ops._C, "int8_scaled_mm_with_quant") else no("this vllm has no such operator")

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """bfloat16 [M, K], quantized per token, -> bfloat16 [M, N]."""
        if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != self.k:
            raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, expected torch.bfloat16 [M, {self.k}]")
        check_bias(bias, self.n)
        if not len(x):
            return x.new_empty((0, self.n))
        bias = None if bias is None else bias.float()
        out: torch.Tensor = torch.ops._C.int8_scaled_mm_with_quant(
            x.contiguous(), self._packed, self._scale, bias, x.dtype, True
        )
        if not math.isfinite(float(x.sum())):  # the operator would hide a NaN
            out[~x.isfinite().all(dim=1)] = torch.nan
        return out
