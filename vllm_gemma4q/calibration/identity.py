"""Which model statistics are of: a digest that moves with the files, not with their times or their folder."""

import hashlib
import platform
from importlib import metadata as packages
from typing import TYPE_CHECKING, Any

import torch

from vllm_gemma4q.calibration.statistics import Statistics
from vllm_gemma4q.checkpoint import Checkpoint
from vllm_gemma4q.checkpoint.convert import VERSION
from vllm_gemma4q.checkpoint.reader import CONFIG
from vllm_gemma4q.errors import InputError

if TYPE_CHECKING:
    from vllm_gemma4q.calibration.decoder import Decoder

DEPENDENCIES = ("torch", "transformers")
_BYTES_OF_TENSOR = 4096


def model_identity(checkpoint: Checkpoint) -> dict[str, str]:
    """Folder's name, and SHA-256 over config.json and each tensor's name, dtype, shape and first 4096 bytes.

    Independent of how tensors are distributed over shards. Two fine-tunes differ in it.
    """
    digest = hashlib.sha256((checkpoint.folder / CONFIG).read_bytes())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        with tensor.path.open("rb") as file:
            file.seek(tensor.start)
            digest.update(file.read(min(_BYTES_OF_TENSOR, tensor.end - tensor.start)))
    return {"name": checkpoint.folder.resolve().name, "sha256": digest.hexdigest()}


def decoder_identity(decoder: "Decoder") -> dict[str, Any]:
    """What beside its input decides every bit of what a decoder computes, for runs that resume."""
    checkpoint = decoder.checkpoint
    files = [*checkpoint.shards, checkpoint.folder / CONFIG]
    return {
        "model": model_identity(checkpoint),
        "dtype": str(decoder.dtype),
        "device": decoder.device.type,
        "python": platform.python_version(),
        "versions": {"vllm-gemma4q": VERSION, **{name: packages.version(name) for name in DEPENDENCIES}},
        "threads": torch.get_num_threads(),
        "source": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
    }


def check_same_model(statistics: Statistics, checkpoint: Checkpoint) -> None:
    """Raises InputError: the statistics were made with another checkpoint."""
    found, expected = statistics.details.get("model") or {}, model_identity(checkpoint)
    if not isinstance(found, dict) or found.get("sha256") != expected["sha256"]:
        name, sha256 = (found.get("name"), found.get("sha256")) if isinstance(found, dict) else (found, None)
        raise InputError(
            f"{statistics.path.name}: statistics of another model: {name} ({str(sha256)[:8]}), "
            f"expected {expected['name']} ({expected['sha256'][:8]})"
        )
