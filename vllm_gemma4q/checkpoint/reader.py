"""A checkpoint folder: its configuration, its shards' headers and which file holds each tensor.

Only headers are read; tensor bytes are streamed by `rewrite.py`. Weights in pickle files are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_gemma4q.checkpoint.header import TensorInfo, read_header, read_json
from vllm_gemma4q.errors import InputError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
_QUANTIZATION = "quantization_config"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint. `tensors` is ordered by shard name, then by position in the shard.

    `digests` are the shards' SHA-256 by name, where something vouches for them.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    digests: Mapping[str, str] = field(default_factory=dict)


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Read a checkpoint's configuration and every shard's header.

    Raises:
        InputError: the folder, its configuration or its index is unreadable; the index names files outside the
            folder, missing shards, or tensors that are not where it says; weights are pickle files only; or a
            header is invalid (see `read_header`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder")
    config = _read_config(folder)
    weight_map = _read_weight_map(folder)
    shards = _shards(folder, weight_map)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, tensor in read_header(shard).items():
            if name in tensors:
                raise InputError(f"tensor {name}: stored twice, in {tensors[name].path.name} and {shard.name}")
            tensors[name] = tensor
    _check_index(weight_map, tensors)
    return Checkpoint(folder, config, shards, tensors)


def _read_config(folder: Path) -> Mapping[str, Any]:
    """Without a `quantization_config` of null, which says that there is none: engines read it so, too."""
    config = read_json(folder / CONFIG)
    return {key: value for key, value in config.items() if key != _QUANTIZATION or value is not None}


def _read_weight_map(folder: Path) -> Mapping[str, str] | None:
    if not (folder / INDEX).exists():
        return None
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{INDEX}: weight_map is missing or empty")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{INDEX}: tensor {name}: {shard!r} is not the name of a safetensors file in the folder")
    return weight_map


def _shards(folder: Path, weight_map: Mapping[str, str] | None) -> tuple[Path, ...]:
    if weight_map is not None:
        shards = tuple(folder / name for name in sorted(set(weight_map.values())))
        for shard in shards:
            if not shard.is_file():
                raise InputError(f"{INDEX}: shard {shard.name} is missing")
        return shards
    shards = tuple(sorted(folder.glob("*.safetensors")))
    if not shards:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        found = f"only pickle files ({pickles[0]}), which are never opened" if pickles else "none"
        raise InputError(f"{folder}: safetensors weights expected, found {found}")
    if len(shards) > 1:
        raise InputError(f"{folder}: {len(shards)} safetensors files but no {INDEX}")
    return shards


def _check_index(weight_map: Mapping[str, str] | None, tensors: Mapping[str, TensorInfo]) -> None:
    if weight_map is None:
        return
    for name, shard in weight_map.items():
        if name not in tensors:
            raise InputError(f"{INDEX}: tensor {name} is missing from {shard}")
        if tensors[name].path.name != shard:
            raise InputError(f"{INDEX}: tensor {name}: got {shard}, stored in {tensors[name].path.name}")
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise InputError(f"{INDEX}: tensor {name} of {tensor.path.name} is not listed")
