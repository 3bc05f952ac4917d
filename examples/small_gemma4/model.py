"""The two architectures, their random initial weights and the checkpoint folders.

`dense` resembles Gemma 4 31B and `moe` 26B-A4B in every trait that matters to an engine: five (here two) sliding layers
to one global layer, `attention_k_eq_v` (global layers have no v_proj), other head size and KV heads in global layers,
soft-capped logits, tied embeddings, experts beside a dense MLP, routers with trained scales, `layer_scalar`, and a
vision tower with standardized output. Checkpoints are BF16; `moe` is written in two shards.
Not done: per-layer-input embeddings and the audio tower, which 31B and 26B-A4B do not have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    GemmaTokenizer,
    GenerationConfig,
)

SOFT_TOKENS = 70
GLOBAL_HEAD_DIM = 64
GLOBAL_KV_HEADS = 1
SLIDING, FULL = "sliding_attention", "full_attention"
TEXT: dict[str, dict[str, Any]] = {
    "dense": {
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
        "intermediate_size": 256,
        "enable_moe_block": False,
    },
    "moe": {
        "layer_types": [SLIDING, SLIDING, FULL],
        "intermediate_size": 96,
        "enable_moe_block": True,
        "num_experts": 16,
        "top_k_experts": 4,
        "moe_intermediate_size": 64,
    },
}
VISION: dict[str, dict[str, Any]] = {
    "dense": {"intermediate_size": 100},
    "moe": {"intermediate_size": 128},
}
BOILERPLATE = {
    "_name_or_path",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
}
SHARD_SIZE = {"dense": "1GB", "moe": "4MB"}


def text_config(kind: str, vocabulary_size: int) -> dict[str, Any]:
    """Keys of `text_config`, in the plain form that published checkpoints use."""
    return {
        "vocab_size": vocabulary_size,
        "hidden_size": 256,
        "num_hidden_layers": len(TEXT[kind]["layer_types"]),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "global_head_dim": GLOBAL_HEAD_DIM,
        "num_global_key_value_heads": GLOBAL_KV_HEADS,
        "attention_k_eq_v": True,
        "sliding_window": 64,
        "max_position_embeddings": 4096,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": vocabulary_size,
        "num_kv_shared_layers": 0,
        **TEXT[kind],
    }


def vision_config(kind: str) -> dict[str, Any]:
    """Keys of `vision_config`; `default_output_length` is read by vLLM only."""
    return {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "position_embedding_size": 256,
        "default_output_length": SOFT_TOKENS,
        "standardize": True,
        **VISION[kind],
    }


def stop_ids(tokenizer: GemmaTokenizer) -> list[int]:
    """Tokens that end the model's turn: <eos>, <turn|> and the opening of a tool's answer."""
    return [tokenizer.eos_token_id, tokenizer.eot_token_id, tokenizer.str_token_id]


def build_config(kind: str, tokenizer: GemmaTokenizer) -> Gemma4Config:
    """The config of `dense` or `moe` with the tokenizer's ids."""
    return Gemma4Config(
        text_config=text_config(kind, len(tokenizer)),
        vision_config=vision_config(kind),
        audio_config=None,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        boa_token_id=tokenizer.boa_token_id,
        eoa_token_index=tokenizer.eoa_token_id,
        audio_token_id=tokenizer.audio_token_id,
        eos_token_id=stop_ids(tokenizer),
        dtype="bfloat16",
    )


def build_processor(tokenizer: GemmaTokenizer) -> Gemma4Processor:
    """Gemma 4's processor with the smallest legal number of soft tokens an image."""
    return Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(max_soft_tokens=SOFT_TOKENS),
        tokenizer=tokenizer,
        video_processor=Gemma4VideoProcessor(),
        chat_template=tokenizer.chat_template,
        image_seq_length=SOFT_TOKENS,
    )


def build_model(config: Gemma4Config, seed: int) -> Gemma4ForConditionalGeneration:
    """A float32 model with random weights; scales that Gemma trains start away from 1."""
    torch.manual_seed(seed)
    model = Gemma4ForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            _initialise(name, tensor, config)
    return model


def _initialise(name: str, tensor: torch.Tensor, config: Gemma4Config) -> None:
    """Overwrite what transformers' default would leave constant or too small for a model of this size."""
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        tensor.fill_(tensor.numel() ** -0.25)
    elif name.endswith("layer_scalar"):
        layer = int(name.split(".layers.")[1].split(".")[0])
        tensor.fill_(1.0 - 0.0625 * (layer + 1))
    elif name.endswith("router.scale"):
        tensor.uniform_(0.75, 1.25).mul_(tensor.numel() ** 0.5)
    elif name.endswith("per_expert_scale"):
        tensor.uniform_(0.75, 1.25)
    elif name.endswith("position_embedding_table"):
        tensor.normal_(0.0, 0.2)
    elif name.endswith("std_bias"):
        tensor.uniform_(-0.5, 0.5)
    elif name.endswith("std_scale"):
        tensor.uniform_(0.1, 0.15)
    elif tensor.ndim >= 2:
        fan_in = tensor.shape[-1]
        tensor.normal_(0.0, 0.04 if name.endswith("embed_tokens.weight") else 0.8 * fan_in**-0.5)


def plain_config(config: Gemma4Config) -> dict[str, Any]:
    """The config as published checkpoints write it: global sizes as two keys instead of `per_layer_config`."""
    result: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    text = result["text_config"]
    text.pop("per_layer_config", None)
    text.update(global_head_dim=GLOBAL_HEAD_DIM, num_global_key_value_heads=GLOBAL_KV_HEADS)
    for part in (result, text, result["vision_config"]):
        part["dtype"] = "bfloat16"
        for key in BOILERPLATE & part.keys():
            del part[key]
    return result


def save(model: Gemma4ForConditionalGeneration, processor: Gemma4Processor, kind: str, folder: Path) -> None:
    """Write a complete checkpoint folder; the weights are rounded to BF16 in place."""
    tokenizer = processor.tokenizer
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE[kind])
    processor.save_pretrained(folder)
    text = json.dumps(plain_config(model.config), indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def load(folder: Path) -> Gemma4ForConditionalGeneration:
    """The checkpoint's BF16 weights in float32, ready to be measured."""
    return Gemma4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
