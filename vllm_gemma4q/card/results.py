"""Result files of one checkpoint: what `--json` of `gemma4q evaluate` and `gemma4q sweep` printed.

A file is of a checkpoint where the identity in it says so (`calibration.identity.model_identity`): its bytes, not its
name or folder. Files of another checkpoint are refused, since a card with another model's figures is worse than none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_gemma4q.checkpoint.header import read_json
from vllm_gemma4q.errors import InputError

_KINDS = "what gemma4q evaluate .. --json or gemma4q sweep .. --json printed"


@dataclass(frozen=True)
class Measurement:
    """Perplexity and perhaps divergence of one run.

    Attributes:
        protocol: texts, context, windows, engine, see `evaluation.measure.Protocol.to_json`.
        found: `perplexity` and `divergence` by framing.
        reference: figures of the original in the same run, where it was one of those measured.
    """

    protocol: Mapping[str, Any]
    found: Mapping[str, Any]
    reference: Mapping[str, Any] | None


@dataclass(frozen=True)
class Results:
    """All that was measured of one checkpoint, in the order of the files."""

    text: Sequence[Measurement] = ()
    gsm8k: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


def read_results(paths: Sequence[Path], model: Mapping[str, str]) -> Results:
    """Figures of the checkpoint with identity `model`.

    Raises:
        InputError: a file cannot be read, is of another kind, or of other checkpoints only.
    """
    text: list[Measurement] = []
    gsm8k: list[Mapping[str, Any]] = []
    for path in paths:
        document = read_json(path)
        if "run" in document and "strict" in document:
            _check(path, [document["run"].get("model")], model)
            gsm8k.append(document)
        elif "protocol" in document:
            entries = list(_entries(document))
            _check(path, [entry.get("model") for entry in entries], model)
            reference = _reference(document)
            text += [
                Measurement(document["protocol"], entry, None if entry is reference else reference)
                for entry in entries
                if _is(entry.get("model"), model)
            ]
        else:
            raise InputError(f"{path}: got keys {sorted(document)[:5]}, expected {_KINDS}")
    return Results(text, gsm8k)


def _entries(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from document.get("checkpoints", {}).values()
    yield from document.get("points", {}).values()


def _reference(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    reference = document.get("reference")
    if isinstance(reference, str):
        found: Mapping[str, Any] = document["checkpoints"][reference]
        return found
    return reference


def _is(found: Any, model: Mapping[str, str]) -> bool:
    return isinstance(found, Mapping) and found.get("sha256") == model["sha256"]


def _check(path: Path, found: Sequence[Any], model: Mapping[str, str]) -> None:
    if not any(_is(each, model) for each in found):
        names = [each.get("name") if isinstance(each, Mapping) else each for each in found]
        raise InputError(
            f"{path}: figures of {', '.join(map(str, names)) or 'nothing'}, "
            f"expected of this checkpoint, {model['name']} ({model['sha256'][:8]})"
        )
