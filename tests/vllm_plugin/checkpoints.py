"""Small INT8 checkpoints in every layout that has been seen, made from one that `gemma4q quantize` wrote.

Edits go through the safetensors library and plain dictionaries, not through the code under test.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

ROOT = "model.language_model.layers."
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def quantize(source: Path, target: Path) -> Path:
    """`gemma4q quantize`, as a user runs it."""
    command = [Path(sys.executable).with_name("gemma4q"), "quantize", source, target, "--scheme", "quark-int8"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return target


def load(folder: Path) -> Tensors:
    """All tensors of a checkpoint."""
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def edit(
    source: Path,
    target: Path,
    tensors: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    exclude: list[str] | None = None,
) -> Path:
    """A copy with other tensors, and with another exclude list where one is given."""
    skip = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", "*manifest*")
    shutil.copytree(source, target, ignore=skip)
    edited = {name: tensor.contiguous().clone() for name, tensor in tensors(load(source)).items()}
    save_file(edited, target / "model.safetensors", metadata={"format": "pt"})
    if exclude is not None:
        config: dict[str, Any] = json.loads((target / "config.json").read_text())
        config["quantization_config"]["exclude"] = exclude
        (target / "config.json").write_text(json.dumps(config))
    return target


def multiply_half(tensors: Tensors, pattern: str, factor: float) -> Tensors:
    """The first half of every tensor whose name matches, times a factor."""
    changed = {}
    for name in [name for name in tensors if re.search(pattern, name)]:
        changed[name] = tensors[name].clone()
        changed[name][: len(changed[name]) // 2] *= factor
    assert changed
    return tensors | changed


def unquantize(tensors: Tensors, bf16: Tensors, prefix: str) -> Tensors:
    """All modules whose names start with `prefix` as they were before quantization."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    return kept | {name: tensor for name, tensor in bf16.items() if name.startswith(prefix)}


def fuse_experts(tensors: Tensors) -> Tensors:
    """Per-expert int8 tensors as 3-D ones, `experts.gate_up_proj` with `experts.gate_up_proj_scale` and so on."""
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in _layers_with_experts(tensors):
        for leaf, suffix in (("weight", ""), ("weight_scale", "_scale")):
            experts = range(sum(f"{layer}{expert}.up_proj.{leaf}" in tensors for expert in range(1000)))
            parts = {
                shard: torch.stack([tensors[f"{layer}{expert}.{shard}.{leaf}"] for expert in experts])
                for shard in ("gate_proj", "up_proj", "down_proj")
            }
            fused[f"{layer}gate_up_proj{suffix}"] = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
            fused[f"{layer}down_proj{suffix}"] = parts["down_proj"]
    return fused


def round_norms(tensors: Tensors) -> Tensors:
    """Quark 0.11's slip: three norms of a MoE layer as int8 with one scale an element."""
    suffixes = ("feedforward_layernorm_1.weight", "feedforward_layernorm_2.weight")
    rounded = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(suffixes):
            scale = tensor.float().abs().clamp_min(1e-8) / 127.5
            rounded[name] = (tensor.float() / scale).round().clamp(-128, 127).to(torch.int8)
            rounded[f"{name}_scale"] = scale.to(torch.bfloat16)
    return rounded


def text_only(source: Path, target: Path) -> Path:
    """The language model alone, as `Gemma4ForCausalLM` saves it: no towers, names under `model.`."""

    def keep(tensors: Tensors) -> Tensors:
        prefix = "model.language_model."
        return {name.replace(prefix, "model."): t for name, t in tensors.items() if name.startswith(prefix)}

    edit(source, target, keep)
    config: dict[str, Any] = json.loads((target / "config.json").read_text())
    shared = {key: config[key] for key in ("quantization_config", "tie_word_embeddings")}
    text = {**config["text_config"], **shared, "architectures": ["Gemma4ForCausalLM"]}
    (target / "config.json").write_text(json.dumps(text))
    return target


def _layers_with_experts(tensors: Tensors) -> list[str]:
    return sorted({name.split("experts.")[0] + "experts." for name in tensors if ".experts." in name})
