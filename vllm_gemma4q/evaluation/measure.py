"""Perplexity of a checkpoint, and its divergence from a reference, on all framings with one start of the engine."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from gguf_mixed.samples import describe_text, read_texts
from vllm_gemma4q.calibration.texts import load_tokenizer
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.distributions import Divergence, compare
from vllm_gemma4q.evaluation.engine import engine_facts, score
from vllm_gemma4q.evaluation.perplexity import Perplexity, perplexity
from vllm_gemma4q.evaluation.windows import Framing, Window, cut_windows


@dataclass(frozen=True)
class Protocol:
    """What checkpoints are measured on.

    Attributes:
        windows: by framing.
        texts: names and SHA-256 of the files.
        context: tokens of a window.
        dtype: of the engine, "auto" for the checkpoint's own.
        tensor_parallel_size: ranks.
    """

    windows: Mapping[Framing, Sequence[Window]]
    texts: Sequence[Mapping[str, object]]
    context: int
    dtype: str = "auto"
    tensor_parallel_size: int = 1

    @property
    def positions(self) -> int:
        """Predicted tokens of all framings."""
        return sum(window.n_predicted for window in self._all)

    @property
    def _all(self) -> list[Window]:
        return [window for windows in self.windows.values() for window in windows]

    def run(self, model: Path, log: Path, distributions: Path | None = None) -> "Measured":
        """Start the engine on a checkpoint and score everything.

        Args:
            distributions: file for the whole vocabulary's log-probabilities.

        Raises:
            InputError: the engine died, or the model's answers are not finite.
        """
        engine = {"dtype": self.dtype, "tensor_parallel_size": self.tensor_parallel_size}
        scores = score(model, self._all, log, distributions, **engine)
        try:
            found = {
                framing: perplexity(scores.logprobs[start:stop]) for framing, (start, stop) in self._spans().items()
            }
        except ValueError as error:
            raise InputError(f"{model}: {error}") from error
        return Measured(found, distributions, scores.vocabulary, scores.seconds)

    def compare(self, reference: "Measured", other: "Measured") -> dict[Framing, Divergence]:
        """Two measurements that recorded distributions. Raises InputError: their vocabularies differ."""
        assert reference.distributions is not None and other.distributions is not None
        if reference.vocabulary != other.vocabulary:
            raise InputError(
                f"vocabulary: got {other.vocabulary} tokens, expected the reference's {reference.vocabulary}"
            )
        return {
            framing: compare(reference.distributions, other.distributions, reference.vocabulary, span)
            for framing, span in self._spans().items()
        }

    def to_json(self) -> dict[str, Any]:
        """What a figure was measured on."""
        return {
            "texts": list(self.texts),
            "context": self.context,
            "windows": {framing.value: len(windows) for framing, windows in self.windows.items()},
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
            "engine": engine_facts(),
        }

    def _spans(self) -> dict[Framing, tuple[int, int]]:
        """Rows of each framing."""
        counts = [sum(window.n_predicted for window in windows) for windows in self.windows.values()]
        return dict(zip(self.windows, pairwise([0, *accumulate(counts)]), strict=True))


@dataclass(frozen=True)
class Measured:
    """One checkpoint: perplexity by framing; the file of its distributions where one was asked for."""

    perplexity: Mapping[Framing, Perplexity]
    distributions: Path | None
    vocabulary: int
    seconds: float

    def to_json(self, divergence: Mapping[Framing, Divergence] | None = None) -> dict[str, Any]:
        """Figures, without the file."""
        found: dict[str, Any] = {
            "perplexity": {framing.value: asdict(value) for framing, value in self.perplexity.items()},
            "seconds": self.seconds,
        }
        if divergence is not None:
            found["divergence"] = {framing.value: asdict(value) for framing, value in divergence.items()}
        return found


def load_protocol(
    tokenizer_of: Path,
    texts: Sequence[Path],
    framings: Sequence[Framing],
    context: int,
    chunks: int | None,
    dtype: str = "auto",
    tensor_parallel_size: int = 1,
) -> Protocol:
    """Cut texts with a checkpoint's tokenizer.

    Raises:
        InputError: no tokenizer, no text, or too little of it.
    """
    tokenizer = load_tokenizer(tokenizer_of)
    text = read_texts(texts)
    windows = {framing: cut_windows(tokenizer, text, framing, context, chunks) for framing in framings}
    return Protocol(windows, describe_text(texts), context, dtype, tensor_parallel_size)
