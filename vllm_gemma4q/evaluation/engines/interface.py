"""What every engine does: score windows of text, and write whole distributions where asked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.perplexity import Perplexity, perplexity
from vllm_gemma4q.evaluation.windows import Framing, Window

Windows = Mapping[Framing, Sequence[Window]]


@dataclass(frozen=True)
class Scores:
    """What a model said to the windows.

    Attributes:
        perplexity: by framing.
        vocabulary: of the recorded distributions, 0 where none were.
        seconds: of scoring.
        floor: natural logarithm; what the engine tells of less likely tokens is their number alone.
    """

    perplexity: Mapping[Framing, Perplexity]
    vocabulary: int
    seconds: float
    floor: float = -math.inf


class Engine(Protocol):
    """One engine with its settings."""

    def facts(self) -> dict[str, str]:
        """Name and version, for results."""
        ...

    def vocabulary(self, model: Path) -> int:
        """Width of the distributions that `score` would write. Reads headers alone.

        Raises:
            InputError: the engine is not installed, or is known to refuse the model.
        """
        ...

    def score(self, model: Path, windows: Windows, log: Path, distributions: Path | None = None) -> Scores:
        """Score a model.

        Args:
            log: receives what the engine prints, behind what is there.
            distributions: a file to write: float32 log-probabilities [predicted tokens, vocabulary], in the order of
                the windows, one framing after the other.

        Raises:
            InputError: the engine is not installed, cannot run the model, or its answers are not finite.
        """
        ...


def spans(windows: Windows) -> dict[Framing, tuple[int, int]]:
    """Rows (start, stop) of each framing among all predicted tokens."""
    counts = [sum(window.n_predicted for window in of_framing) for of_framing in windows.values()]
    return dict(zip(windows, pairwise([0, *accumulate(counts)]), strict=True))


def all_windows(windows: Windows) -> list[Window]:
    """Of all framings, one framing after the other."""
    return [window for of_framing in windows.values() for window in of_framing]


def perplexities(model: Path, logprobs: npt.NDArray[np.float32], windows: Windows) -> dict[Framing, Perplexity]:
    """From the log-probabilities of all predicted tokens.

    Raises:
        InputError: one is not finite.
    """
    try:
        return {framing: perplexity(logprobs[start:stop]) for framing, (start, stop) in spans(windows).items()}
    except ValueError as error:
        raise InputError(f"{model}: {error}") from error
