"""EXL3 in Triton for NVIDIA and AMD GPUs: what `dispatch` chooses on a GPU.

    triton_decode.py       windows, codebooks, butterflies: what kernels share
    triton_reconstruct.py  dense weights, to the bit
    triton_linear.py       few rows: decoding and multiplying in one

Few rows are multiplied with weights that are decoded in registers, to float32's precision. For many, some columns at a
time are made dense and torch multiplies: weights, and the bias, are then rounded to the dtype of `x` first. Importing
this module imports Triton. Workspaces come from `torch.empty` and nothing is synchronized: CUDA graphs capture a call.

Not done here: one launch for all shards of a fused linear; experts; tuning. Where the fused kernel stops being the
faster one (`FUSED_ROWS`) is estimated from bytes moved, not measured.
"""

from collections.abc import Sequence

import torch

from gemma4q_kernels.exl3.format import Exl3Weight, Problem
from gemma4q_kernels.exl3.triton_linear import multiply
from gemma4q_kernels.exl3.triton_reconstruct import reconstruct_columns, words_of
from gemma4q_kernels.exl3_layout import BLOCK, TILE
from gemma4q_kernels.support import Support, architecture, no, triton_support

FUSED_ROWS = 64
# Weights that are dense at a time: 64 MiB of bfloat16.
SCRATCH_WEIGHTS = 1 << 25


def can_implement(problem: Problem) -> Support:
    """A GPU (or the interpreter) with matrix instructions for float16 in sizes that Triton uses."""
    support = triton_support(problem.device)
    if not support:
        return support
    arch = architecture(problem.device)
    if arch.startswith("sm_") and int(arch.removeprefix("sm_")) < 80:
        return no(f"needs sm_80 or newer, got {arch}")
    return support


def reconstruct(weight: Exl3Weight, dtype: torch.dtype) -> torch.Tensor:
    """See `gemma4q_kernels.exl3.reconstruct`."""
    shape = (weight.in_features, weight.out_features)
    out = torch.empty(shape, dtype=dtype, device=weight.trellis.device)
    suh, svh = weight.suh.contiguous(), weight.svh.contiguous()
    reconstruct_columns(words_of(weight.trellis), suh, svh, weight.codebook, out)
    return out


def linear(x: torch.Tensor, shards: Sequence[Exl3Weight], bias: torch.Tensor | None) -> torch.Tensor:
    """See `gemma4q_kernels.exl3.linear`."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty((len(rows), sum(shard.out_features for shard in shards)), dtype=x.dtype, device=x.device)
    start = 0
    for shard in shards:
        stop = start + shard.out_features
        part = None if bias is None else bias[start:stop].contiguous()
        run = _fused if len(rows) <= FUSED_ROWS else _dense
        run(rows, shard, part, out[:, start:stop])
        start = stop
    return out.view(*x.shape[:-1], -1)


def _fused(x: torch.Tensor, weight: Exl3Weight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    suh, svh = weight.suh.contiguous(), weight.svh.contiguous()
    multiply(x, words_of(weight.trellis), suh, svh, weight.codebook, bias, out)


def _dense(x: torch.Tensor, weight: Exl3Weight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Some columns at a time, in one scratch."""
    words, suh, svh = words_of(weight.trellis), weight.suh.contiguous(), weight.svh.contiguous()
    step = min(max(SCRATCH_WEIGHTS // weight.in_features // BLOCK, 1) * BLOCK, weight.out_features)
    scratch = torch.empty((weight.in_features, step), dtype=x.dtype, device=x.device)
    for start in range(0, weight.out_features, step):
        columns = slice(start, min(start + step, weight.out_features))
        dense = scratch[:, : columns.stop - start]
        reconstruct_columns(words[:, start // TILE : columns.stop // TILE], suh, svh[columns], weight.codebook, dense)
        if bias is None:
            torch.mm(x, dense, out=out[:, columns])
        else:
            torch.addmm(bias[columns].to(x.dtype), x, dense, out=out[:, columns])
