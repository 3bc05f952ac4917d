"""Tensors of FP8 static checkpoints, turned into what this plugin's methods load while they stream by.

A linear's scale becomes a column, one value a row, so that fused linears keep a scale for each of their shards. A
column of scales of one expert becomes a vector.
Fused 3-D experts and their scales are split into one tensor an expert. Leftover scales are dropped.
One tensor at a time; nothing here needs vLLM.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch

from vllm_gemma4q.fp8_static.facts import FUSED_INPUT_SCALES, Facts
from vllm_gemma4q.fp8_static.format import INPUT_SCALE
from vllm_gemma4q.module_headers import (
    FUSED_WEIGHT_SCALES,
    WEIGHT_SCALE,
    fused_expert_part,
    is_one_expert,
    relative_name,
)

Weights = Iterable[tuple[str, torch.Tensor]]
Stream = Iterator[tuple[str, torch.Tensor]]


def mend(weights: Weights, facts: Facts) -> Stream:
    """Stream (name, tensor) pairs, under any root of the language model, in the layout that is loaded."""
    leftovers = {relative_name(name) for name in facts.leftovers}
    for name, tensor in weights:
        relative = relative_name(name)
        module, _, leaf = relative.rpartition(".")
        if relative in leftovers:
            continue
        if part := fused_expert_part(name):
            yield from _experts(name, tensor, part, facts.fp8)
        elif leaf == WEIGHT_SCALE and module in facts.fp8:
            yield name, spread(tensor, facts.fp8[module])
        elif leaf == WEIGHT_SCALE and is_one_expert(name):
            yield name, tensor.float().reshape(-1) if tensor.numel() > 1 else tensor
        else:
            yield name, tensor


def spread(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """A scale of a whole tensor, or of each row, as a float32 column [rows, 1]."""
    return scale.float().reshape(-1, 1).expand(rows, 1).contiguous()


def _experts(name: str, tensor: torch.Tensor, part: str, fp8: Mapping[str, int]) -> Stream:
    """Fused experts: weights [E, N, K] in E4M3 or unquantized.

    Scales hold one value for all experts, [E], [E, 2] (gate and up apart) or [E, N]; trailing ones are allowed.

    Args:
        fp8: how many experts a layer has, by its relative name.
    """
    prefix, _, rest = name.partition(f".experts.{part}")
    prefix += ".experts"
    if rest in FUSED_INPUT_SCALES or rest in FUSED_WEIGHT_SCALES:
        experts = fp8[relative_name(prefix)]
        leaf = INPUT_SCALE if rest in FUSED_INPUT_SCALES else WEIGHT_SCALE
        scales = tensor.reshape(1, 1) if tensor.numel() == 1 else tensor.reshape(experts, -1)
        yield from _split(prefix, part, leaf, scales.expand(experts, -1))
    elif tensor.dtype is torch.float8_e4m3fn:
        yield from _split(prefix, part, "weight", tensor)
    else:
        yield f"{prefix}.{part}", tensor


def _split(prefix: str, part: str, leaf: str, tensor: torch.Tensor) -> Stream:
    """[E, ..] by expert; gate's rows lie before up's, and a single value is for both."""
    for expert, rows in enumerate(tensor):
        if part == "down_proj":
            yield f"{prefix}.{expert}.down_proj.{leaf}", _scalar(rows, leaf)
        else:
            gate, up = rows.chunk(2) if len(rows) > 1 else (rows, rows)
            yield f"{prefix}.{expert}.gate_proj.{leaf}", _scalar(gate, leaf)
            yield f"{prefix}.{expert}.up_proj.{leaf}", _scalar(up, leaf)


def _scalar(rows: torch.Tensor, leaf: str) -> torch.Tensor:
    return rows.reshape(()) if leaf != "weight" and rows.numel() == 1 else rows
