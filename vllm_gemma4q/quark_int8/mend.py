"""Tensors that quantizers lay out otherwise, turned into what vLLM loads while they stream by.

Fused 3-D int8 experts and their scales are split into one tensor an expert; a column of scales of one expert becomes a
vector; norms rounded to int8 are dequantized; zero points are dropped where they are all zero. One tensor at a time;
nothing here needs vLLM.
"""

from collections.abc import Iterable, Iterator

import torch

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.module_headers import (
    FUSED_WEIGHT_SCALES,
    WEIGHT_SCALE,
    fused_expert_part,
    is_one_expert,
    relative_name,
)
from vllm_gemma4q.quark_int8.facts import ZERO_POINT

Weights = Iterable[tuple[str, torch.Tensor]]
Stream = Iterator[tuple[str, torch.Tensor]]


def mend(weights: Weights, int8_norms: frozenset[str], half_norms: dict[str, torch.Tensor]) -> Stream:
    """Stream (name, tensor) pairs in the layout that vLLM loads.

    Args:
        weights: pairs under any root of the language model.
        int8_norms: modules whose weights are int8, relative to that root.
        half_norms: weights and scales of norms whose other half has not arrived; kept between calls.

    Raises:
        InputError: a zero point is not zero.
    """
    for name, tensor in weights:
        module, _, leaf = name.rpartition(".")
        if leaf == ZERO_POINT:
            if tensor.any():
                raise InputError(f"tensor {name}: got zero points other than 0, expected 0 (symmetric weights)")
        elif relative_name(module) in int8_norms and leaf in ("weight", WEIGHT_SCALE):
            yield from _norm(module, leaf, tensor, half_norms)
        elif fused_expert_part(name):
            yield from _experts(name, tensor)
        elif leaf == WEIGHT_SCALE and is_one_expert(name):
            yield name, tensor.reshape(-1)  # vLLM takes columns of linears, but not of experts
        else:
            yield name, tensor


def _norm(module: str, leaf: str, tensor: torch.Tensor, halves: dict[str, torch.Tensor]) -> Stream:
    other = f"{module}.{WEIGHT_SCALE if leaf == 'weight' else 'weight'}"
    if other not in halves:
        halves[f"{module}.{leaf}"] = tensor
        return
    rounded, scale = (tensor, halves.pop(other)) if leaf == "weight" else (halves.pop(other), tensor)
    yield f"{module}.weight", rounded.float() * scale.float().reshape(-1)


def _experts(name: str, tensor: torch.Tensor) -> Stream:
    """Fused experts: weights [E, N, K] int8 or unquantized, scales [E, N] or [E, N, 1]."""
    part = fused_expert_part(name)
    prefix, _, rest = name.partition(f".experts.{part}")
    prefix += ".experts"
    is_scale = rest in FUSED_WEIGHT_SCALES
    if not is_scale and tensor.dtype is not torch.int8:
        yield f"{prefix}.{part}", tensor
        return
    leaf = WEIGHT_SCALE if is_scale else "weight"
    for expert, rows in enumerate(tensor.reshape(tensor.shape[:2]) if is_scale else tensor):
        if part == "down_proj":
            yield f"{prefix}.{expert}.down_proj.{leaf}", rows
        else:
            gate, up = rows.chunk(2)
            yield f"{prefix}.{expert}.gate_proj.{leaf}", gate
            yield f"{prefix}.{expert}.up_proj.{leaf}", up
