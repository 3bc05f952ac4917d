"""Runs of the EXL3 writer on checkpoints small enough to be encoded in seconds, and statistics for them."""

import json

import numpy as np
from made_statistics import SHARED, observe, random_inputs
from safetensors.torch import load_file
from synthetic import small_config

from vllm_gemma4q.architecture import is_fused_experts, is_linear_weight, parse_text_architecture
from vllm_gemma4q.calibration.identity import model_identity
from vllm_gemma4q.calibration.statistics import as_arrays, write_statistics
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.exl3.quantize import plan

LAYER = "model.language_model.layers.0"
FULL, SLIDING = "full_attention", "sliding_attention"
SAMPLES, LENGTH = 3, 11


def tiny_config(*layer_types, moe=False, **text):
    """A few linears of at most 256 x 128 with padding; a full layer has no values."""
    sizes = {"vocab_size": 256, "num_hidden_layers": len(layer_types), "layer_types": list(layer_types)}
    if moe:
        sizes |= {"num_experts": 2, "top_k_experts": 1}
    return small_config(moe, **{**sizes, **text})


def write_hessians(folder, path, without=(), change=lambda module, hessian: hessian):
    """A statistics file with Hessians; those of `without` are left out.

    Returns:
        By module, fused experts under one: the mean of x x^T, float32.
    """
    architecture = parse_text_architecture(json.loads((folder / "config.json").read_text()))
    shapes = [(name, shape) for name, shape in architecture.shapes() if is_linear_weight(name, shape)]
    shapes.append(("lm_head.weight", (architecture.vocab_size, architecture.hidden_size)))
    arrays, stored_as, means = {}, {}, {}
    for seed, (name, shape) in enumerate(shapes):
        module = name if is_fused_experts(name) else name.removesuffix(".weight")
        parent, _, last = module.rpartition(".")
        stored = stored_as[module] = f"{parent}.{SHARED[last]}" if last in SHARED else module
        if last not in SHARED:
            rows = random_inputs(shape, seed)
            every = np.concatenate(rows)
            hessian = change(module, (every.T @ every).astype(np.float32))
            arrays |= as_arrays(module, observe(rows), None if module in without else hessian)
            means[module] = hessian / np.float32(len(every))
        means[module] = means[stored]
    model = model_identity(open_checkpoint(folder))
    details = {"samples": SAMPLES, "tokens": 32, "max_length": LENGTH, "model": model}
    write_statistics(path, arrays, stored_as, details)
    return means


def load(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def run(source, target, options, statistics=None, progress=lambda _: None, **keywords):
    """Write, and return the plan and what was written."""
    conversion = plan(open_checkpoint(source), options, statistics, **keywords)
    assert convert(conversion, target, ["test"], progress)
    return conversion, load(target)


def manifest(target):
    return json.loads((target / "gemma4q-manifest.json").read_text())
