"""Runs of the FP8 quantizer, and its rules spelled out once more to compare with."""

import json

import numpy as np
import torch
from safetensors.torch import load_file

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.fp8_static.quantize import plan

E4M3 = torch.float8_e4m3fn
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
Q, K = "model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.k_proj"
DOWN = "model.language_model.layers.1.mlp.down_proj"
EXPERTS = "model.language_model.layers.0.experts"


def load(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def run(source, statistics, target, options=None, **keywords):
    assert convert(plan(open_checkpoint(source), statistics, options, **keywords), target, ["test"], lambda _: None)
    return load(target)


def manifest(target):
    return json.loads((target / "gemma4q-manifest.json").read_text())


def same(one, other):
    """Bit for bit, NaN and signs of zero included."""
    same_kind = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same_kind and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def weights_before(tensors):
    """Every linear of the language model, experts one by one, by module."""
    result = {}
    for name, tensor in tensors.items():
        if "language_model" not in name or "router" in name:
            continue
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, rows in enumerate(tensor):
                result[f"{prefix}.{expert}.gate_proj"], result[f"{prefix}.{expert}.up_proj"] = rows.chunk(2)
        elif last == "down_proj":
            result |= {f"{prefix}.{expert}.down_proj": rows for expert, rows in enumerate(tensor)}
        elif name.endswith("_proj.weight"):
            result[prefix] = tensor
    return result


def aligned_scales(weights):
    """absmax / 448 in float32, doubled while the largest of the fused siblings stays ahead: never below its own."""
    own = {name: np.float32(float(weight.abs().max()) / 448) for name, weight in weights.items()}
    result = {}
    for name, scale in own.items():
        parent, _, last = name.rpartition(".")
        shards = next((shards for shards in FUSED if last in shards), (last,))
        candidate = max(own[f"{parent}.{shard}"] for shard in shards if f"{parent}.{shard}" in own)
        while candidate / 2 >= scale:
            candidate = np.float32(candidate / 2)
        result[name] = candidate
    return result


def fused_name(module):
    prefix, _, last = module.rpartition(".")
    prefix, _, expert = prefix.rpartition(".")
    if not expert.isdigit():
        return module, 0
    return f"{prefix}.{'down_proj' if last == 'down_proj' else 'gate_up_proj'}", int(expert)
