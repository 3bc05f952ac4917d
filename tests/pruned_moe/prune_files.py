"""Prunes of small checkpoints by the code under test, and comparison bit for bit."""

import json
from pathlib import Path

import torch
from vllm_plugin.checkpoints import Tensors, load

from gguf_mixed.drop_map import RetainedExperts
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.pruned_moe import prune

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "small_gemma4" / "moe"
NUM_EXPERTS, N_LAYERS = 16, 3  # of the example
LAYERS = "model.language_model.layers."


def retained(kept, num_experts=NUM_EXPERTS):
    return RetainedExperts(num_experts, tuple(map(tuple, kept)))


def run(source, target, kept, options=None, num_experts=NUM_EXPERTS, **keywords) -> Tensors:
    """Prune; returns what was written."""
    conversion = prune.plan(open_checkpoint(source), retained(kept, num_experts), options, **keywords)
    assert convert(conversion, target, ["test"], lambda _: None)
    return load(target)


def write(conversion, target) -> Tensors:
    assert convert(conversion, target, ["test"], lambda _: None)
    return load(target)


def config(folder):
    return json.loads((folder / "config.json").read_text())


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, NaN and signs of zero included."""
    same_kind = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same_kind and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def differences(one: Tensors, other: Tensors) -> list[str]:
    """Names of tensors that are not in both, or not the same bit for bit."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if not (name in one and name in other and same(one[name], other[name]))
    )


def one_by_one(tensors):
    """Fused experts as one tensor an expert and linear."""
    result = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        for expert, rows in enumerate(tensor) if last in ("gate_up_proj", "down_proj") else ():
            parts = dict(zip(("gate_proj", "up_proj"), rows.chunk(2), strict=True)) if "gate" in last else {last: rows}
            result |= {f"{prefix}.{expert}.{part}.weight": weight for part, weight in parts.items()}
        if last not in ("gate_up_proj", "down_proj"):
            result[name] = tensor
    return result
