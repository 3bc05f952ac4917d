"""Perplexity of a model on a text, from the log-probabilities of its tokens."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-probability; `error` is one standard error, as llama-perplexity computes it.

    It takes tokens for independent, which those of one text are not.
    """

    value: float
    error: float
    positions: int


def perplexity(logprobs: npt.NDArray[np.float32]) -> Perplexity:
    """Of the tokens' log-probabilities, natural logarithms [n], n at least 2.

    Raises:
        ValueError: too few, or one that is not a number; the message says how many.
    """
    if len(logprobs) < 2:
        raise ValueError(f"positions: got {len(logprobs)}, expected at least 2")
    if bad := int((~np.isfinite(logprobs)).sum()):
        raise ValueError(f"log-probabilities: got {bad} of {len(logprobs)} that are not finite")
    nats = -logprobs.astype(np.float64)
    value = math.exp(nats.mean())
    return Perplexity(value, value * math.sqrt(nats.var() / (len(nats) - 1)), len(nats))
