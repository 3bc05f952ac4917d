"""Sound files of every format, which the mutators then damage. Made by the libraries and tools that users have."""

import json
import struct
from collections import defaultdict
from pathlib import Path

import made_statistics
import numpy as np
from hostile.gguf_bytes import ARRAY, BOOL, F32, STRING, U32, File, Key, TensorInfo
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from synthetic import small_config, write_checkpoint
from vllm_plugin import checkpoints, exl3_checkpoints
from vllm_plugin import fp8_checkpoints as fp8

from vllm_gemma4q.calibration.identity import model_identity
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.quark_int8 import quantize as quark_int8

_GGML_F32, _GGML_BF16 = 0, 30


def write_unquantized(folder: Path) -> dict[str, Path]:
    """Checkpoint folders by name: dense, sharded, a mixture, and one of a few bytes that is no model."""
    sizes = {"sliding_window": 512, "max_position_embeddings": 4096}
    made = {
        "dense": write_checkpoint(folder / "dense", small_config(**sizes)),
        "sharded": write_checkpoint(folder / "sharded", small_config(**sizes), shards=3),
        "moe": write_checkpoint(folder / "moe", small_config(moe=True, **sizes)),
        "tiny": folder / "tiny",
    }
    made["tiny"].mkdir()
    (made["tiny"] / "config.json").write_text("{}")
    layers = [f"model.language_model.layers.{layer}." for layer in range(2)]
    tensors = {
        f"{layer}{name}.weight": np.ones((4, 2), np.float16)
        for layer in layers
        for name in ("mlp.up_proj", "self_attn.q_proj")
    }
    tensors |= {f"{layer}layer_scalar": np.ones(1, np.float32) for layer in layers}
    save_file(tensors, made["tiny"] / "model.safetensors", {"format": "pt"})
    return made


def write_quantized(folder: Path) -> dict[str, Path]:
    """Those of the folder, and one of each scheme made of them."""
    made = {name: folder / name for name in ("dense", "moe", "sharded")}
    for name in ("dense", "moe"):
        int8 = folder / f"int8-{name}"
        assert convert(quark_int8.plan(open_checkpoint(made[name])), int8, ["gemma4q"], lambda _: None)
        inputs = defaultdict(lambda: 50.0)
        eight = fp8.quantize(made[name], folder / f"fp8-{name}", inputs, fp8.linears_outside(made[name]))
        packed, _ = exl3_checkpoints.make(made[name], folder / f"exl3-{name}", folder / f"unpacked-{name}")
        made |= {f"int8-{name}": int8, f"fp8-{name}": eight, f"exl3-{name}": packed}
    made["int8-fused"] = checkpoints.edit(made["int8-moe"], folder / "int8-fused", checkpoints.fuse_experts)
    return made


def write_statistics(folder: Path, checkpoint: Path) -> Path:
    """What `gemma4q calibrate` writes for a checkpoint."""
    path = folder / f"{checkpoint.name}.statistics"
    made_statistics.write_for(checkpoint, path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    details = {"samples": 1, "tokens": 32, "max_length": 64, "texts": [{"name": "a.txt", "sha256": "0"}]}
    details |= {"model": model_identity(open_checkpoint(checkpoint))}
    save_file(load_file(path), path, {**metadata, "details": json.dumps(details)})
    return path


def gguf_model() -> File:
    """A mixture of one layer, as much as its header goes."""
    shapes = {
        "token_embd.weight": (256, 32), "output_norm.weight": (256,), "blk.0.attn_q.weight": (256, 8),
        "blk.0.attn_output.weight": (100, 4), "blk.0.attn_norm.weight": (256,), "blk.0.ffn_down_exps.weight": (32, 8,
        3),
        "blk.0.ffn_gate_inp.weight": (256, 3),
    }  # fmt: skip
    file = File([*_gemma4_keys()], [])
    for name, shape in shapes.items():
        kind = _GGML_F32 if len(shape) == 1 or name.endswith("inp.weight") else _GGML_BF16
        _append(file, name, shape, kind, bytes(int(np.prod(shape)) * (4 if kind == _GGML_F32 else 2)))
    return file


def _gemma4_keys() -> list[Key]:
    numbers = {
        "block_count": 1, "context_length": 4096, "embedding_length": 256, "feed_forward_length": 512,
        "attention.head_count": 4,
        "attention.key_length": 64, "attention.value_length": 64, "attention.key_length_swa": 32,
        "attention.sliding_window": 512,
        "expert_count": 3, "expert_used_count": 2, "embedding_length_per_layer_input": 0,
    }  # fmt: skip
    return [
        Key("general.architecture", STRING, "gemma4"), Key("general.file_type", U32, 32),
        *(Key(f"gemma4.{name}", U32, value) for name, value in numbers.items()),
        Key("gemma4.attention.head_count_kv", ARRAY, [2]),
        Key("gemma4.attention.sliding_window_pattern", ARRAY, [True], items=BOOL),
        Key("gemma4.attention.layer_norm_rms_epsilon", F32, 1e-6),
        Key("tokenizer.ggml.tokens", ARRAY, ["<pad>", "<eos>", "a"], items=STRING),
        Key("tokenizer.chat_template", STRING, "<|turn>{{ tools }}"),
    ]  # fmt: skip


def _append(file: File, name: str, shape: tuple[int, ...], kind: int, content: bytes) -> None:
    file.tensors.append(TensorInfo(name, shape, kind, len(file.data)))
    file.data += content + bytes(-len(content) % file.alignment)


def gguf_imatrix() -> File:
    """An importance matrix of that model."""
    file = File([Key("general.type", STRING, "imatrix"), Key("imatrix.datasets", ARRAY, ["a.txt"], items=STRING),
                 Key("imatrix.chunk_count", U32, 3), Key("imatrix.chunk_size", U32, 512)], [])  # fmt: skip
    for name, length, matrices in (("blk.0.attn_q.weight", 256, 1), ("blk.0.ffn_down_exps.weight", 32, 3)):
        for suffix, shape in (
            (".in_sum2", (length, matrices)),
            (".counts", (1, matrices)),
            (".in_sum", (length, matrices)),
        ):
            _append(file, name + suffix, shape, _GGML_F32, np.full(shape, 512, "<f4").tobytes())
    return file


def legacy_imatrix() -> bytes:
    """The same in the older format."""
    entries = b""
    for name, length in ((b"blk.0.attn_q.weight", 256), (b"blk.0.ffn_down_exps.weight", 96)):
        entries += (
            struct.pack("<i", len(name)) + name + struct.pack("<ii", 3, length) + np.ones(length, "<f4").tobytes()
        )
    return struct.pack("<i", 2) + entries + struct.pack("<ii", 3, 5) + b"a.txt"


def write_fisher(path: Path) -> None:
    """Squared gradients of all tensors of the model."""
    arrays = {}
    for tensor in gguf_model().tensors:
        columns, rows, matrices = (*tensor.shape, 1, 1)[:3]
        arrays |= {f"{tensor.name}.rows": np.ones((matrices, rows), np.float32)}
        arrays |= {f"{tensor.name}.columns": np.ones((matrices, columns), np.float32)}
    save_file(
        arrays, path, {"format": "gguf-mixed fisher 1", "positions": "64", "details": json.dumps({"text": "a.txt"})}
    )


DROP_MAP = json.dumps({str(layer): [layer, 3] for layer in range(3)}).encode()
QUESTIONS = b"".join(
    json.dumps({"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"}).encode() + b"\n" for n in range(3)
)
DIVERGENCES = b"QTYPE,token_embd.weight,blk.0.attn_q.weight\nQ8_0,0.0001,0.0001\nQ2_K,0.5,0.25\n"
ERROR_CACHE = b'{"gguf-mixed error cache": 1}\n{"tensor": "a", "digest": "d", "sums": {"Q4_K": 0.5}}\n'
BASE_FILE = b"_logits_" + struct.pack("<Iii", 512, 16, 1) + bytes(4 * 512) + bytes(2 * 20 * 255)
