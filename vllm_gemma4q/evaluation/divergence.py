"""How far a quantized model's next-token distributions are from the original's.

Kullback-Leibler divergence KL(original || quantized) in nats a position, and how often both put the same
token first, over the same prompts. Cheap, sensitive, and needs no right answers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles, stdev
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai import OpenAI

# Log-probability of each token id at one position: the whole vocabulary, or its most likely part.
Scores = Mapping[int, float]


@dataclass(frozen=True)
class Divergence:
    """Over `positions` next-token distributions; divergences in nats, `standard_error` of the mean."""

    mean_kld: float
    standard_error: float
    p99_kld: float
    same_top: float
    positions: int


def divergence(reference: Sequence[Scores], other: Sequence[Scores]) -> Divergence:
    """Compare two models over the same positions (two or more).

    Raises:
        ValueError: the numbers of positions differ, or a score is not a number.
    """
    if len(reference) != len(other):
        raise ValueError(f"positions: got {len(other)}, expected {len(reference)}")
    klds = [_kld(p, q) for p, q in zip(reference, other, strict=True)]
    same = [max(p, key=p.__getitem__) == max(q, key=q.__getitem__) for p, q in zip(reference, other, strict=True)]
    return Divergence(
        mean_kld=fmean(klds),
        standard_error=stdev(klds) / math.sqrt(len(klds)),
        p99_kld=quantiles(klds, n=100)[-1],
        same_top=fmean(same),
        positions=len(klds),
    )


def _kld(p: Scores, q: Scores) -> float:
    """KL(p || q) over p's tokens; what both leave unlisted counts as one more token, so the result is a lower bound.

    A token that q does not list has at most q's smallest listed probability, and is given that.
    """
    if any(map(math.isnan, p.values())) or any(map(math.isnan, q.values())):
        raise ValueError("a log-probability is NaN")
    smallest = min(q.values())
    total, p_rest, q_rest = 0.0, 1.0, 1.0
    for token, log_p in p.items():
        log_q = q.get(token, smallest)
        if log_p > -math.inf:
            total += math.exp(log_p) * (log_p - log_q)
        p_rest -= math.exp(log_p)
        q_rest -= math.exp(log_q)
    if p_rest > 1e-6 and q_rest > 1e-6:
        total += p_rest * math.log(p_rest / q_rest)
    return max(total, 0.0)


def prompt_scores(client: "OpenAI", model: str, prompt: Sequence[int], top: int) -> list[Scores]:
    """Scores of each position of a prompt from a vLLM server: position t scores token t + 1.

    Args:
        client: an OpenAI client of a server started with `--max-logprobs` of at least `top`.
        prompt: token ids.
        top: how many tokens a position, most likely first (vLLM adds the prompt's own token).
    """
    answer = client.completions.create(
        model=model, prompt=list(prompt), max_tokens=1, temperature=0, extra_body={"prompt_logprobs": top}
    )
    extra = answer.choices[0].model_extra or {}
    positions = extra["prompt_logprobs"][1:]
    return [{int(token): score["logprob"] for token, score in position.items()} for position in positions]
