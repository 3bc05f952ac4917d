"""Perplexity of a checkpoint or GGUF, and its divergence from a reference, with one start of the engine each."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gguf_mixed.atomic_file import refusals
from gguf_mixed.perplexity import base_bytes
from gguf_mixed.samples import describe_text, read_texts
from vllm_gemma4q.calibration.texts import load_tokenizer
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.distributions import VALUE_BYTES, Divergence, compare
from vllm_gemma4q.evaluation.engines.interface import Engine, Windows, all_windows, spans
from vllm_gemma4q.evaluation.engines.logits_file import check_tokens
from vllm_gemma4q.evaluation.engines.settings import Settings, is_gguf
from vllm_gemma4q.evaluation.perplexity import Perplexity
from vllm_gemma4q.evaluation.windows import Framing, chunk_windows, cut_windows


@dataclass(frozen=True)
class Protocol:
    """What models are measured on.

    Attributes:
        windows: by framing.
        texts: names and SHA-256 of the files.
        context: tokens of a window.
        settings: how they are run.
        text: the files' content, which llama.cpp reads itself.
        only_gguf: no checkpoint folder is among the models.
    """

    windows: Windows
    texts: Sequence[Mapping[str, object]]
    context: int
    settings: Settings = field(default_factory=Settings)
    text: str = field(default="", repr=False)
    only_gguf: bool = False

    @property
    def positions(self) -> int:
        """Predicted tokens of all framings."""
        return sum(window.n_predicted for window in all_windows(self.windows))

    def engine(self, model: Path | None = None) -> Engine:
        """What runs a model; without one, what runs most."""
        if is_gguf(model) if model else self.only_gguf:
            return self.settings.for_gguf(self.text)
        return self.settings.for_folders()

    def check_room(self, reference: Path, others: Sequence[Path], folder: Path, instead: str) -> None:
        """Two models' distributions fit in `folder`, and what llama.cpp writes beside the second.

        Args:
            instead: what a user may choose in place of the folder.

        Raises:
            InputError: they do not, in bytes; or see `Engine.vocabulary`.
        """
        needed = self._bytes_of(reference) + max(
            self._bytes_of(model) + self._bytes_beside(model) for model in (reference, *others)
        )
        with refusals(folder):
            free = shutil.disk_usage(folder).free
        if free < needed:
            raise InputError(
                f"{folder}: distributions of two models take {needed:,} bytes, and {free:,} are free: "
                f"fewer --chunks, or {instead}"
            )

    def _bytes_of(self, model: Path) -> int:
        return VALUE_BYTES * self.positions * self.engine(model).vocabulary(model)

    def _bytes_beside(self, model: Path) -> int:
        if not is_gguf(model):
            return 0
        return base_bytes(self.engine(model).vocabulary(model), len(self.windows[Framing.RAW]), self.context)

    def run(
        self, model: Path, log: Path, distributions: Path | None = None, engine: Engine | None = None
    ) -> "Measured":
        """Start the engine on a model and score everything.

        Args:
            distributions: file for the whole vocabulary's log-probabilities.
            engine: another than the model's.

        Raises:
            InputError: see `Engine.score`.
        """
        engine = engine or self.engine(model)
        scores = engine.score(model, self.windows, log, distributions)
        own = None if (facts := engine.facts()) == self.engine().facts() else facts
        return Measured(scores.perplexity, distributions, scores.vocabulary, scores.seconds, scores.floor, own)

    def compare(self, reference: "Measured", other: "Measured") -> dict[Framing, Divergence]:
        """Two measurements that recorded distributions. Raises InputError: see `compare`."""
        assert reference.distributions is not None and other.distributions is not None
        files, floor = (reference.distributions, other.distributions), max(reference.floor, other.floor)
        return {
            framing: compare(*files, reference.vocabulary, span, other_vocabulary=other.vocabulary, floor=floor)
            for framing, span in spans(self.windows).items()
        }

    def to_json(self) -> dict[str, Any]:
        """What a figure was measured on."""
        return {
            "texts": list(self.texts),
            "context": self.context,
            "windows": {framing.value: len(windows) for framing, windows in self.windows.items()},
            "dtype": self.settings.dtype,
            "tensor_parallel_size": self.settings.tensor_parallel_size,
            "engine": self.engine().facts(),
        }


@dataclass(frozen=True)
class Measured:
    """One model.

    Attributes:
        perplexity: by framing.
        distributions: their file, where one was asked for.
        vocabulary: its width.
        seconds: of scoring.
        floor: see `Scores`.
        engine: name and version, where it is not the protocol's.
    """

    perplexity: Mapping[Framing, Perplexity]
    distributions: Path | None
    vocabulary: int
    seconds: float
    floor: float = -math.inf
    engine: Mapping[str, str] | None = None

    def to_json(self, divergence: Mapping[Framing, Divergence] | None = None) -> dict[str, Any]:
        """Figures, without the file."""
        found: dict[str, Any] = {"perplexity": by_name(self.perplexity), "seconds": self.seconds}
        if self.engine is not None:
            found["engine"] = dict(self.engine)
        if divergence is not None:
            found["divergence"] = by_name(divergence)
        return found


def by_name(figures: "Mapping[Framing, Perplexity] | Mapping[Framing, Divergence]") -> dict[str, Any]:
    """Figures of each framing as JSON values."""
    return {framing.value: asdict(value) for framing, value in figures.items()}


def load_protocol(
    models: Sequence[Path],
    texts: Sequence[Path],
    framings: Sequence[Framing] | None,
    context: int,
    chunks: int | None,
    settings: Settings,
    log: Path,
) -> Protocol:
    """Cut texts with the tokenizer of the first checkpoint folder among the models.

    Every GGUF is asked for the tokens that it makes of the text; these are what is measured where all are GGUF.

    Args:
        framings: None for both, or with a GGUF for raw, the only one that llama.cpp knows.
        log: receives what llama.cpp prints.

    Raises:
        InputError: no tokenizer, no text, too little of it, a framing that llama.cpp does not know, a GGUF with
            another tokenizer, or a model that its engine is known to refuse.
    """
    files, folders = [model for model in models if is_gguf(model)], [model for model in models if not is_gguf(model)]
    if files and Framing.CHAT in (framings or ()):
        raise InputError(f"--framing chat: got {files[0].name}, expected raw: llama-perplexity knows no chat template")
    framings = framings or ([Framing.RAW] if files else list(Framing))
    text, tokenizer, windows = read_texts(texts), None, {}
    if folders:
        settings.for_folders()
        tokenizer = load_tokenizer(folders[0])
        windows = {framing: cut_windows(tokenizer, text, framing, context, chunks) for framing in framings}
    for model in files:
        n_windows = len(windows[Framing.RAW]) if windows else chunks
        found = settings.for_gguf(text).tokens(model, context, n_windows, log)
        windows = windows or {Framing.RAW: chunk_windows(found.tolist(), chunks)}
        check_tokens(model, found, windows[Framing.RAW], tokenizer)
    protocol = Protocol(windows, describe_text(texts), context, settings, text, only_gguf=not folders)
    for model in models:  # all of them before the first, which may take hours
        protocol.engine(model).vocabulary(model)
    return protocol
