"""Quantized checkpoints damaged as tools really damage them, written with the safetensors library alone."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TOWERS = ("vision_tower", "embed_vision", "router.proj")


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by name."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit."""
    same_kind = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same_kind and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace a checkpoint's weights by one file."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def write_config(folder: Path, config: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def change_quantization(folder: Path, without: tuple[str, ...] = (), **changes) -> None:
    """Set and remove keys of config.json's quantization_config."""
    config = read_config(folder)
    quantization = {**config["quantization_config"], **changes}
    config["quantization_config"] = {key: value for key, value in quantization.items() if key not in without}
    write_config(folder, config)


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and a scalar scale."""
    scale = weight.float().abs().max() / 448
    return (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and a scale a row."""
    scale = weight.float().abs().amax(dim=-1) / 127
    return (weight.float() / scale[..., None]).round().to(torch.int8), scale


def towers(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Weights of the linears that the published story tells of."""
    return [
        name
        for name, tensor in tensors.items()
        if any(part in name for part in TOWERS) and name.endswith(".weight") and tensor.dim() == 2
    ]


def quantize_towers(tensors: dict[str, torch.Tensor], to=to_fp8, scales=("input_scale",)) -> list[str]:
    """Quantize the vision tower, embed_vision and the router in place, each with a weight_scale and more scales."""
    names = towers(tensors)
    for name in names:
        module = name.removesuffix(".weight")
        tensors[name], tensors[f"{module}.weight_scale"] = to(tensors[name])
        for scale in scales:
            tensors[f"{module}.{scale}"] = torch.tensor(0.1)
    return names
