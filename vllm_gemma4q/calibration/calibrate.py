"""One calibration from start to statistics file: what decides its bytes, its passes, and putting its parts together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import numpy as np

from gguf_mixed.fisher import Fisher, read_fisher
from gguf_mixed.fisher import metadata as fisher_metadata
from gguf_mixed.tasks import Executor
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.fisher import FORWARDS_WORTH, Backward, chosen
from vllm_gemma4q.calibration.fold import N_PARTS
from vllm_gemma4q.calibration.forward import HEAD, Forward, Progress, layer_part
from vllm_gemma4q.calibration.identity import DEPENDENCIES, decoder_identity, model_identity
from vllm_gemma4q.calibration.recorder import linears
from vllm_gemma4q.calibration.statistics import LM_HEAD, Statistics, metadata, read_statistics
from vllm_gemma4q.calibration.texts import Samples
from vllm_gemma4q.calibration.work import Work, join_parts
from vllm_gemma4q.checkpoint.convert import VERSION
from vllm_gemma4q.checkpoint.reader import CONFIG
from vllm_gemma4q.checkpoint.scale import require_same_files
from vllm_gemma4q.errors import InputError

_SAMPLES = "samples"


@dataclass(frozen=True)
class Calibration:
    """What to run.

    Attributes:
        decoder: the model, with dtype and device.
        samples: to run.
        max_length: that they were cut to, for the record.
        limit: bytes of activations to keep in memory; the result does not depend on it.
        hessians: also sum x x^T of every linear.
        passes: samples to differentiate for the Fisher file, spread evenly over all; 0 for none.
        seed: of the labels' draw there.
    """

    decoder: Decoder
    samples: Samples
    max_length: int
    limit: int
    hessians: bool = False
    passes: int = 0
    seed: int = 0

    @property
    def n_steps(self) -> int:
        """Tokens times layers: what `progress` adds up to."""
        backward = FORWARDS_WORTH * sum(len(self.samples.ids[number]) for number in self.differentiated)
        return (self.samples.n_tokens + backward) * self.decoder.n_layers

    @property
    def differentiated(self) -> list[int]:
        """Samples of the backward pass."""
        return chosen(len(self.samples.ids), self.passes)

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
            "versions": {"vllm-gemma4q": VERSION, **{name: packages.version(name) for name in DEPENDENCIES}},
        }

    def fisher_details(self) -> dict[str, Any]:
        """How the Fisher file was made; the first keys are those of `gguf-mixed fisher`."""
        return {
            "text": list(self.samples.described),
            "framing": self.samples.framing,
            "length": self.max_length,
            "passes": len(self.differentiated),
            "seed": self.seed,
            **{key: value for key, value in self.details().items() if key in ("dtype", "device", "model", "versions")},
        }

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it resumes."""
        identity = {
            **self.details(),
            "parts": N_PARTS,
            "differentiated": self.differentiated,
            "seed": self.seed,
            **decoder_identity(self.decoder),
        }
        if not self.passes:  # the forward pass is the same with any number of threads
            del identity["threads"]
        return identity


def calibrate(
    calibration: Calibration,
    target: Path,
    work: Path,
    fisher: Path | None = None,
    progress: Progress = lambda tokens: None,
    workers: Executor | None = None,
) -> bool:
    """Write a statistics file, and a Fisher file where asked, resuming an unfinished run of the same calibration.

    Args:
        target: the statistics file.
        work: folder for what is kept between layers; removed at the end.
        fisher: the Fisher file; `calibration.passes` must not be 0.
        progress: called with tokens that have passed a layer.
        workers: who runs the forward pass; None: this process, which always does the backward pass.

    Returns:
        False when the files were there already, from the same calibration.

    Raises:
        InputError: a file holds something else, the work folder is another run's, or the source is bad; workers that
            do not see the same files or are of another version; TaskLost.
    """
    assert (fisher is not None) == bool(calibration.passes)
    decoder, samples, identity = calibration.decoder, calibration.samples.ids, calibration.identity()
    if _is_there(calibration, target, fisher):
        if work.exists():  # killed while it was removed
            with Work(work, identity) as parts:
                parts.complete()
        return False
    with Work(work, identity) as parts:
        if workers is not None:
            files = [*decoder.checkpoint.shards, decoder.checkpoint.folder / CONFIG]
            require_same_files(workers, work, files, also=DEPENDENCIES)
        kept = calibration.differentiated
        Forward(decoder, samples, parts, calibration.limit, calibration.hessians, kept, progress, workers).run()
        if fisher is not None:
            backward = Backward(decoder, [samples[number] for number in kept], parts, calibration.seed, progress)
            _write_fisher(calibration, parts, fisher, backward.run())
        if calibration.identity() != identity:
            raise InputError(f"{decoder.checkpoint.folder}: changed while it was read")
        _write(calibration, parts, target)
        parts.complete()
    return True


def _is_there(calibration: Calibration, target: Path, fisher: Path | None) -> bool:
    """Whether all files are there. Raises InputError: one is, and is of another run."""
    there = []
    for path, read, details in (
        (target, read_statistics, calibration.details()),
        (fisher, read_fisher, calibration.fisher_details()),
    ):
        if path is None:
            continue
        there.append(path.exists())
        if there[-1] and _made_by(path, read) != details:
            raise InputError(f"{path}: exists, and was not made by this command; remove it or choose another name")
    return all(there)


def _write_fisher(calibration: Calibration, work: Work, target: Path, parts: Sequence[str]) -> None:
    positions = sum(len(calibration.samples.ids[number]) for number in calibration.differentiated)
    described = fisher_metadata(positions, calibration.fisher_details())
    join_parts(target, [work.part(name) for name in parts], described)


def _write(calibration: Calibration, parts: Work, target: Path) -> None:
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
    join_parts(target, [parts.part(name) for name in names], metadata(stored_as, calibration.details()))


def _made_by(path: Path, read: Callable[[Path], Statistics | Fisher]) -> Mapping[str, Any] | None:
    try:
        return read(path).details
    except InputError:
        return None
