"""One calibration from start to statistics file: what decides its bytes, its passes, and putting its parts together."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.forward import HEAD, Forward, Progress, layer_part
from vllm_gemma4q.calibration.identity import model_identity
from vllm_gemma4q.calibration.recorder import linears
from vllm_gemma4q.calibration.statistics import LM_HEAD, metadata, read_statistics
from vllm_gemma4q.calibration.texts import Samples
from vllm_gemma4q.calibration.work import Work, join_parts
from vllm_gemma4q.checkpoint.convert import VERSION
from vllm_gemma4q.checkpoint.reader import CONFIG
from vllm_gemma4q.errors import InputError

_SAMPLES = "samples"
_DEPENDENCIES = ("torch", "transformers")


@dataclass(frozen=True)
class Calibration:
    """What to run.

    Attributes:
        decoder: the model, with dtype and device.
        samples: to run.
        max_length: that they were cut to, for the record.
        limit: bytes of activations to keep in memory; the result does not depend on it.
        hessians: also sum x x^T of every linear.
    """

    decoder: Decoder
    samples: Samples
    max_length: int
    limit: int
    hessians: bool = False

    @property
    def n_steps(self) -> int:
        """Tokens times layers: what `progress` adds up to."""
        return self.samples.n_tokens * self.decoder.n_layers

    def details(self) -> dict[str, Any]:
        """How the file was made, for its metadata."""
        return {
            "samples": len(self.samples.ids),
            "tokens": self.samples.n_tokens,
            "max_length": self.max_length,
            "framing": self.samples.framing,
            "texts": list(self.samples.described),
            "hessians": self.hessians,
            "dtype": str(self.decoder.dtype).removeprefix("torch."),
            "device": self.decoder.device.type,
            "model": model_identity(self.decoder.checkpoint),
            "versions": {"vllm-gemma4q": VERSION, **{name: packages.version(name) for name in _DEPENDENCIES}},
        }

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it resumes."""
        checkpoint = self.decoder.checkpoint
        files = [*checkpoint.shards, checkpoint.folder / CONFIG]
        return {
            **self.details(),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "source": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        }


def calibrate(calibration: Calibration, target: Path, work: Path, progress: Progress = lambda tokens: None) -> bool:
    """Write a statistics file, resuming an unfinished run of the same calibration.

    Args:
        target: the file.
        work: folder for what is kept between layers; removed at the end.
        progress: called with tokens that have passed a layer.

    Returns:
        False when the file was there already, from the same calibration.

    Raises:
        InputError: `target` holds something else, the work folder is another run's, or the source is bad.
    """
    details = calibration.details()
    if target.exists() and not work.exists():
        if _made_by(target) == details:
            return False
        raise InputError(f"{target}: exists, and was not made by this command; remove it or choose another name")
    identity = calibration.identity()
    with Work(work, identity) as parts:
        forward = Forward(
            calibration.decoder,
            calibration.samples.ids,
            parts,
            calibration.limit,
            calibration.hessians,
            progress=progress,
        )
        forward.run()
        if calibration.identity() != identity:
            raise InputError(f"{calibration.decoder.checkpoint.folder}: changed while it was read")
        _write(calibration, parts, target, details)
        parts.complete()
    return True


def _write(calibration: Calibration, parts: Work, target: Path, details: Mapping[str, Any]) -> None:
    decoder, samples = calibration.decoder, calibration.samples
    tokens = [len(sample) for sample in samples.ids]
    arrays = {"samples.text": np.array(samples.texts, np.int32), "samples.tokens": np.array(tokens, np.int32)}
    parts.write_part(_SAMPLES, arrays)
    names = [*map(layer_part, range(decoder.n_layers)), HEAD, _SAMPLES]
    stored_as = {LM_HEAD: LM_HEAD}
    for index in range(decoder.n_layers):
        prefix = decoder.layer_name(index)
        paths = linears(decoder.architecture, index)
        stored_as |= {f"{prefix}.{path}": f"{prefix}.{stored}" for path, stored in paths.items()}
    join_parts(target, [parts.part(name) for name in names], metadata(stored_as, details))


def _made_by(path: Path) -> Mapping[str, Any] | None:
    try:
        return read_statistics(path).details
    except InputError:
        return None
