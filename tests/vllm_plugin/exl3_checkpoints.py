"""Small EXL3 checkpoints with random trellises, since any bits are valid, and the dense models that they mean.

A trained small model gives names, sizes, norms, embeddings, routers and towers; every linear of the language model is
replaced. Bits and codebooks differ from linear to linear, also among shards that engines fuse; one linear has packed
signs, one half a sign vector of each kind; the output layer is packed while the configuration ties it.
"""

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gemma4q_kernels.exl3 import Exl3Weight, codebook_of, reconstruct
from safetensors.torch import save_file
from vllm_plugin.checkpoints import Tensors, load

LAYERS = "model.language_model.layers."
# (codebook, int16 a tile), in turn: all codebooks, all bits, a half rate. Neighbours, and so fused shards, differ.
FORMATS = [
    ("mcg", 64),
    ("mul1", 48),
    ("3inst", 80),
    ("mul1", 56),
    ("mcg", 32),
    ("3inst", 128),
    ("mul1", 96),
    ("3inst", 16),
    ("mcg", 112),
]
OLD_SIGNS, HALF_OLD_SIGNS = f"{LAYERS}0.self_attn.q_proj", f"{LAYERS}1.self_attn.q_proj"
QUANTIZATION = {
    "quant_method": "exl3",
    "version": "0.0.6",
    "bits": 4.0,
    "head_bits": 6,
    "calibration": {"rows": 100, "cols": 2048},
    "out_scales": "auto",
}

_LINEAR = re.compile(rf"^({re.escape(LAYERS)}\d+\.(?:self_attn|mlp)\.[a-z]+_proj)\.weight$")
_EXPERTS = re.compile(rf"^({re.escape(LAYERS)}\d+\.experts)\.(gate_up_proj|down_proj)$")


def make(source: Path, packed: Path, dense: Path) -> tuple[Path, Path]:
    """Both checkpoints, float32 where they are dense, made from a BF16 one."""
    torch.manual_seed(0)
    linears: dict[str, tuple[int, int]] = {}
    kept: Tensors = {}
    for name, tensor in load(source).items():
        if match := _LINEAR.match(name):
            linears[match[1]] = (tensor.shape[0], tensor.shape[1])
        elif match := _EXPERTS.match(name):
            linears |= _experts(match[1], match[2], tensor.shape)
        else:
            kept[name] = tensor
    embeddings = kept["model.language_model.embed_tokens.weight"]
    linears["lm_head"] = (embeddings.shape[0], embeddings.shape[1])
    formats = itertools.cycle(FORMATS)
    tensors = {module: _random(module, shape, *next(formats)) for module, shape in sorted(linears.items())}
    stored = {f"{module}.{leaf}": tensor for module, parts in tensors.items() for leaf, tensor in parts.items()}
    _write(source, packed, kept | stored, quantization_config=QUANTIZATION)
    (packed / "quantization_config.json").write_text(json.dumps(QUANTIZATION | {"tensor_storage": _storage(tensors)}))
    weights = {f"{module}.weight": meant(tensors[module], shape) for module, shape in linears.items()}
    _write(source, dense, kept | weights, tie_word_embeddings=False)
    return packed, dense


def edit(source: Path, target: Path, tensors: Callable[[Tensors], Tensors]) -> Path:
    """A copy with other tensors."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors(load(source)), target / "model.safetensors", metadata={"format": "pt"})
    return target


def scale_half(tensors: Tensors, pattern: str, factor: float) -> Tensors:
    """The first half of every vector of signs whose name matches, times a factor."""
    changed = {}
    for name in [name for name in tensors if re.search(pattern, name)]:
        changed[name] = tensors[name].clone()
        changed[name][: len(changed[name]) // 2] *= factor
    assert changed
    return tensors | changed


def pack_tower(tensors: Tensors) -> Tensors:
    """With a linear of the vision tower packed too."""
    name = "model.vision_tower.encoder.layers.0.mlp.up_proj.linear"
    shape = tensors[f"{name}.weight"].shape
    parts = _random(name, (shape[0], shape[1]), "mcg", 96)
    kept = {key: tensor for key, tensor in tensors.items() if key != f"{name}.weight"}
    return kept | {f"{name}.{leaf}": tensor for leaf, tensor in parts.items()}


def packed_bytes(folder: Path) -> int:
    """Of all packed linears, as the file has them with unpacked signs; keys that are values are there once."""
    total = 0
    for name, tensor in load(folder).items():
        leaf = name.rpartition(".")[2]
        if leaf in ("trellis", "suh", "svh"):
            total += tensor.nbytes
        elif leaf in ("su", "sv"):
            total += 16 * tensor.nbytes
    return total


def weights(folder: Path) -> int:
    """How many weights the linears of a decoded checkpoint have."""
    return sum(tensor.numel() for name, tensor in load(folder).items() if tensor.dtype is torch.float32)


def meant(parts: Tensors, shape: tuple[int, int]) -> torch.Tensor:
    """The dense weight [out, in] that tensors of a linear stand for."""
    signs = [parts.get(new, parts.get(old)) for new, old in (("suh", "su"), ("svh", "sv"))]
    weight = Exl3Weight(parts["trellis"], *signs, codebook_of(parts))
    dense = reconstruct(weight.trellis, weight.suh, weight.svh, weight.codebook, dtype=torch.float32)
    return dense[: shape[1], : shape[0]].t().contiguous()


def _experts(prefix: str, part: str, shape: torch.Size) -> Iterator[tuple[str, tuple[int, int]]]:
    count, rows, columns = shape
    for expert in range(count):
        for name in ("down_proj",) if part == "down_proj" else ("gate_proj", "up_proj"):
            yield f"{prefix}.{expert}.{name}", (rows if part == "down_proj" else rows // 2, columns)


def _random(module: str, shape: tuple[int, int], codebook: str, width: int) -> Tensors:
    """A linear [out, in]: both sides padded to whole blocks, outputs of the padding zero, inputs of it anything."""
    out_features, in_features = shape
    rows, columns = (-(-size // 128) * 128 for size in (in_features, out_features))
    trellis = torch.randint(-(2**15), 2**15, (rows // 16, columns // 16, width), dtype=torch.int16)
    suh = torch.randn(rows).sign() * (torch.rand(rows) + 0.5)
    svh = torch.randn(columns).sign() * (torch.rand(columns) + 0.5) * 0.03
    svh[out_features:] = 0
    parts = {"trellis": trellis, "suh": suh.half(), "svh": svh.half()}
    if module in (OLD_SIGNS, HALF_OLD_SIGNS):
        parts["su"] = torch.randint(-(2**15), 2**15, (rows // 16,), dtype=torch.int16)
        del parts["suh"]
    if module == OLD_SIGNS:
        parts["sv"] = torch.randint(-(2**15), 2**15, (columns // 16,), dtype=torch.int16)
        del parts["svh"]
    if codebook != "3inst":
        parts[codebook] = torch.tensor(1, dtype=torch.int32)
    return parts


def _storage(tensors: dict[str, Tensors]) -> dict[str, Any]:
    return {
        module: {
            "stored_tensors": {
                f"{module}.{leaf}": {"shape": list(tensor.shape), "n_bytes": tensor.nbytes, "dtype": str(tensor.dtype)}
                for leaf, tensor in parts.items()
            },
            "quant_format": "exl3",
            "bits_per_weight": parts["trellis"].shape[2] // 16,
        }
        for module, parts in tensors.items()
    }


def _write(source: Path, target: Path, tensors: Tensors, **config: Any) -> None:
    skip = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json")
    shutil.copytree(source, target, ignore=skip)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    old = json.loads((target / "config.json").read_text())
    if "tie_word_embeddings" in config:
        old["text_config"] |= {"tie_word_embeddings": config["tie_word_embeddings"]}
    (target / "config.json").write_text(json.dumps(old | config))
