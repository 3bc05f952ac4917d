"""Small checkpoints of every scheme for reports, and what their headers say, read without the code under test."""

import json
import math
import shutil
import struct
from collections import defaultdict
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file, save_file
from synthetic import shapes
from vllm_plugin import exl3_checkpoints
from vllm_plugin import fp8_checkpoints as fp8

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.checkpoint.header import write_header
from vllm_gemma4q.quark_int8 import quantize as quark_int8
from vllm_gemma4q.quark_int8.format import quantization_config

SMALL = Path(__file__).resolve().parents[2] / "examples" / "small_gemma4"
HOSTILE = "<script>alert(1)</script>"
HOSTILE_TENSOR = f"model.language_model.layers.0.{HOSTILE}.weight"
ATTENTION = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
MLP = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
LINEARS = {**ATTENTION, **MLP}
GGUF_LINEARS = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up",
                "down": "ffn_down"}  # fmt: skip
GGUF_LAYERS, GGUF_WIDTH = 6, 256


def write_int8(folder: Path, kind: str = "dense") -> Path:
    assert convert(quark_int8.plan(open_checkpoint(SMALL / kind)), folder, ["gemma4q", "quantize"], lambda _: None)
    return folder


def write_fp8(folder: Path, kind: str = "dense") -> Path:
    return fp8.quantize(SMALL / kind, folder, defaultdict(lambda: 50.0), fp8.linears_outside(SMALL / kind))


def write_exl3(folder: Path, kind: str = "dense") -> tuple[Path, Path]:
    """The packed checkpoint, and the dense one that it means, float32."""
    return exl3_checkpoints.make(SMALL / kind, folder, folder.with_name(f"{folder.name}-dense"))


def copy_of(source: Path, target: Path) -> Path:
    """A copy that may be changed, without its manifest."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*manifest*"))
    for path in target.rglob("*"):
        path.chmod(0o644)
    return target


def edit(folder: Path, change) -> None:
    """Replace a checkpoint's tensors by those that `change` makes of them."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_hostile(source: Path, folder: Path) -> Path:
    """Names and texts that would be scripts on a page that does not escape: folder, tensor, method, manifest."""
    target = copy_of(source, folder / "<img src=x onerror=alert(2)>")
    edit(target, lambda tensors: {**tensors, HOSTILE_TENSOR: tensors["model.language_model.norm.weight"].clone()})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["quant_method"] = f'"><b>{HOSTILE}'
    (target / "config.json").write_text(json.dumps(config))
    manifest = {"command": ["gemma4q", HOSTILE], "versions": {HOSTILE: HOSTILE}, "source": {HOSTILE: {"sha256": "'\""}}}
    (target / "gemma4q-manifest.json").write_text(json.dumps({**manifest, "output": {}}))
    return target


def header(folder: Path) -> dict[str, tuple[str, list[int], int]]:
    """dtype, shape and bytes of every tensor."""
    content = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + length])
    return {
        name: (entry["dtype"], entry["shape"], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def bits_of(folder: Path, original: Path, layer: int, module: str) -> float | None:
    """Bits a weight of a linear: all bytes stored below its name, over the weights of the original."""
    prefix = f"model.language_model.layers.{layer}.{module}."
    n_bytes = sum(size for name, (_, _, size) in header(folder).items() if name.startswith(prefix))
    weight = header(original).get(f"{prefix}weight")
    return None if weight is None else 8 * n_bytes / (weight[1][0] * weight[1][1])


def shown(bits: float | None) -> str:
    """As a cell says it."""
    return "" if bits is None else f"{bits:.1f}".removesuffix(".0")


def write_gguf(path: Path, types: dict[str, GGMLQuantizationType]) -> Path:
    """Six layers of random weights; `types` by module, F32 where there is none. The same weights every time."""
    generator = np.random.default_rng(0)
    writer = GGUFWriter(path, "gemma4")
    for key, value in _gguf_keys().items():
        (writer.add_array if isinstance(value, list) else writer.add_uint32)(f"gemma4.{key}", value)
    writer.add_token_list(["a", "b"])
    writer.add_chat_template("<|turn>")
    names = {"token_embd.weight": "embedding"}
    for layer in range(GGUF_LAYERS):
        names |= {f"blk.{layer}.{part}.weight": module for module, part in GGUF_LINEARS.items()}
    for name, module in names.items():
        values = generator.standard_normal((GGUF_WIDTH // 2, GGUF_WIDTH), np.float32)
        qtype = types.get(module, GGMLQuantizationType.F32)
        writer.add_tensor(name, quantize(values, qtype), raw_dtype=qtype)
    for layer in range(GGUF_LAYERS):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(GGUF_WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_keys() -> dict[str, int | list[int] | list[bool]]:
    pattern = [layer % 6 != 5 for layer in range(GGUF_LAYERS)]
    return {
        "block_count": GGUF_LAYERS, "context_length": 4096, "embedding_length": GGUF_WIDTH,
        "attention.head_count_kv": [1] * GGUF_LAYERS, "attention.key_length": 64, "attention.key_length_swa": 32,
        "attention.sliding_window": 1024, "attention.sliding_window_pattern": pattern,
    }  # fmt: skip


def gguf_bits(path: Path) -> dict[str, float]:
    """Bits a weight by tensor, by the gguf package's own reader."""
    return {tensor.name: 8 * int(tensor.n_bytes) / int(tensor.n_elements) for tensor in GGUFReader(path).tensors}


def write_headers(folder: Path, config: dict) -> Path:
    """An INT8 checkpoint of any size: headers, and a hole where its weights would be."""
    folder.mkdir()
    stored = []
    for name, shape in shapes(config).items():
        role = name.rpartition(".layers.")[2] if name.startswith("model.language_model.layers.") else ""
        if ".experts." in role:
            stored += [part for expert in range(shape[0]) for part in _expert(name, expert, shape)]
        elif role.endswith("_proj.weight"):
            stored += [(name, "I8", shape), (f"{name}_scale", "F32", shape[:1])]
        else:
            stored.append((name, "BF16", shape))
    header_bytes = write_header(stored)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header_bytes)
        sizes = {"I8": 1, "BF16": 2, "F32": 4}
        file.truncate(len(header_bytes) + sum(sizes[dtype] * math.prod(shape) for _, dtype, shape in stored))
    quantization = quantization_config(["lm_head"])
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


def _expert(name: str, expert: int, shape: tuple[int, ...]) -> list[tuple[str, str, tuple[int, ...]]]:
    parent, _, part = name.rpartition(".")
    shards = ("down_proj",) if part == "down_proj" else ("gate_proj", "up_proj")
    rows = shape[1] // len(shards)
    modules = [f"{parent}.{expert}.{shard}" for shard in shards]
    return [
        stored
        for module in modules
        for stored in ((f"{module}.weight", "I8", (rows, shape[2])), (f"{module}.weight_scale", "F32", (rows,)))
    ]
