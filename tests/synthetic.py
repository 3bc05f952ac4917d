"""Gemma-4-shaped checkpoints with random weights, or with no weights at all, for tests and benchmarks.

Written without the code under test: shapes come from `architecture.py`, bytes from the safetensors
library; a header-only checkpoint is a header followed by a hole, so 60 GB of model take no disk.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_gemma4q.architecture import parse_text_architecture

Shapes = Iterable[tuple[str, tuple[int, ...]]]

# Sizes of the published models (config.json of google/gemma-4-31B-it and gemma-4-26B-A4B-it).
CONFIG_31B = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "model_type": "gemma4",
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "gemma4_text",
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": True,
        "vocab_size": 262144,
        "hidden_size_per_layer_input": 0,
        "tie_word_embeddings": True,
    },
    "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27},
}
CONFIG_26B_A4B = {
    **CONFIG_31B,
    "text_config": {
        **CONFIG_31B["text_config"],
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
}


def small_config(moe: bool = False, **text: Any) -> dict[str, Any]:
    """A configuration of a few hundred thousand parameters with the traits of the real ones."""
    base = CONFIG_26B_A4B if moe else CONFIG_31B
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "vocab_size": 256,
    }
    if moe:
        sizes |= {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return {**base, "text_config": {**base["text_config"], **sizes, **text}, "vision_config": vision}


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the language model and the vision tower."""
    result = dict(parse_text_architecture(config).shapes())
    vision = config.get("vision_config")
    if vision:
        result |= _vision_shapes(vision, config["text_config"]["hidden_size"])
    return result


def _vision_shapes(vision: Mapping[str, int], text_hidden: int) -> dict[str, tuple[int, ...]]:
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    tower = "model.vision_tower."
    result: dict[str, tuple[int, ...]] = {
        f"{tower}patch_embedder.input_proj.weight": (hidden, 768),
        f"{tower}patch_embedder.position_embedding_table": (2, 10240, hidden),
        "model.embed_vision.embedding_projection.weight": (text_hidden, hidden),
    }
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    linears |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"{tower}encoder.layers.{layer}."
        result |= {f"{prefix}{name}.linear.weight": shape for name, shape in linears.items()}
        result |= {f"{prefix}self_attn.{name}_norm.weight": (hidden // 16,) for name in "qk"}
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            result[f"{prefix}{norm}_layernorm.weight"] = (hidden,)
    return result


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], shards: int = 1, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """A checkpoint with normally distributed weights, sharded by count of tensors, and a few sidecars."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    names = list(shapes(config).items())
    per_shard = math.ceil(len(names) / shards)
    weight_map = {}
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        chunk = names[number * per_shard : (number + 1) * per_shard]
        tensors = {name: _random(shape, dtype, generator) for name, shape in chunk}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if shards > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"temperature": 1.0})
    write_json(folder / "tokenizer_config.json", {"eos_token": "<eos>"})
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    return folder


# By kind, module and shape of what is stored, as weights, in layers of `small_config` beside what it asks for.
LEFT_OVER = {
    "shard": ("layers.2.self_attn.v_proj", (32, 64)),  # of the layer whose values are its keys
    "adapter": ("layers.0.self_attn.q_proj.lora_A", (8, 64)),
    "layer": ("layers.7.mlp.up_proj", (96, 64)),
}


def add_left_over(folder: Path) -> dict[str, str]:
    """Put `LEFT_OVER` into a checkpoint of one shard. Returns full modules by kind."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    modules = {kind: f"model.language_model.{module}" for kind, (module, _) in LEFT_OVER.items()}
    extra = {f"{modules[kind]}.weight": _random(shape, torch.bfloat16, generator)
             for kind, (_, shape) in LEFT_OVER.items()}  # fmt: skip
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    return modules


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).normal_(std=0.02, generator=generator)


def write_header_only(folder: Path, config: Mapping[str, Any], tensors: Shapes) -> Path:
    """A BF16 checkpoint whose single shard is a header and a hole of the right size."""
    folder.mkdir(parents=True)
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in tensors:
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    write_json(folder / "config.json", config)
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
