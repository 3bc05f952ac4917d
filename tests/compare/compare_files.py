"""Models to compare, and result files around their real digests."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from vllm_gemma4q.compare.model import open_model

# What Gemma 4's configuration needs beside `synthetic.small_config` for its memory to be known.
CACHE = {"sliding_window": 64, "max_position_embeddings": 8192}
TEXT = {"name": "held_out.txt", "sha256": "ab" * 32}


def write_gguf(path: Path, text: Mapping[str, Any], qtype: str = "F16", **changes: int) -> Path:
    """A GGUF with the metadata of a small text configuration and two tensors of its shapes, 0.25 everywhere."""
    sizes = {
        "block_count": text["num_hidden_layers"],
        "context_length": text["max_position_embeddings"],
        "embedding_length": text["hidden_size"],
        "feed_forward_length": text["intermediate_size"],
        "attention.head_count": text["num_attention_heads"],
        "attention.key_length": text["global_head_dim"],
        "attention.key_length_swa": text["head_dim"],
        "attention.sliding_window": text["sliding_window"],
        "attention.shared_kv_layers": 0,
    }
    sliding = [kind == "sliding_attention" for kind in text["layer_types"]]
    writer = GGUFWriter(path, arch="gemma4")
    for key, value in {**sizes, **changes}.items():
        writer.add_uint32(f"gemma4.{key}", value)
    heads = [text["num_key_value_heads"] if each else text["num_global_key_value_heads"] for each in sliding]
    writer.add_array("gemma4.attention.head_count_kv", heads)
    writer.add_array("gemma4.attention.sliding_window_pattern", sliding)
    for name, rows in (("token_embd.weight", text["vocab_size"]), ("blk.0.ffn_up.weight", text["intermediate_size"])):
        values = np.full((rows, text["hidden_size"]), 0.25, np.float32)
        kind = GGMLQuantizationType[qtype]
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("rope_freqs.weight", np.ones(16, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text_results(
    path: Path,
    models: Sequence[Path],
    reference: Path | None = None,
    *,
    engines: Mapping[Path, Mapping[str, str]] | None = None,
    noise_floor: float | None = None,
    seed: int = 0,
    **protocol: Any,
) -> Path:
    """As `gemma4q evaluate perplexity|divergence --json` prints: made-up figures, of the real digests."""
    draw = random.Random(seed)
    document: dict[str, Any] = {
        "protocol": {
            "texts": [TEXT],
            "context": 512,
            "windows": {"raw": 4},
            "dtype": "auto",
            "tensor_parallel_size": 1,
            "engine": {"name": "vllm", "version": "0.32.0"},
            **protocol,
        },
        "checkpoints": {},
    }
    framings = document["protocol"]["windows"]
    if reference is not None:
        document["reference"] = str(reference)
    if noise_floor is not None:
        document["noise_floor"] = {framing: _kld(noise_floor) for framing in framings}
    for model in [*([] if reference is None else [reference]), *models]:
        value = 9 + draw.random()
        found: dict[str, Any] = {
            "model": open_model(model).identity,
            "perplexity": {framing: {"value": value, "error": 0.05, "positions": 1020} for framing in framings},
        }
        if engines and model in engines:
            found["engine"] = engines[model]
        if reference is not None and model != reference:
            found["divergence"] = {framing: _kld(draw.uniform(0.001, 0.2)) for framing in framings}
        document["checkpoints"][str(model)] = found
    path.write_text(json.dumps(document))
    return path


def _kld(mean: float) -> dict[str, float]:
    tail = {"median_kld": mean / 3, "p99_kld": 8 * mean, "p999_kld": 20 * mean, "max_kld": 40 * mean}
    return {"mean_kld": mean, "error": mean / 20, **tail, "same_top": 1 - mean, "positions": 1020}
