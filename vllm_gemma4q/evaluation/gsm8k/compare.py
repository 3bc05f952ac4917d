"""Two runs on the same questions: the difference in accuracy, with an interval, and McNemar's exact test.

Only questions that one run answered right and the other did not say anything about the difference, so the test is a
binomial one on these. The interval is Agresti and Min's for matched pairs (Statistics in Medicine 24, 2005): Wald's,
after half a question is added to each of the four cells.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import binomtest, norm

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.gsm8k.answers import Outcome, Parse
from vllm_gemma4q.evaluation.gsm8k.results import Results
from vllm_gemma4q.evaluation.gsm8k.score import CONFIDENCE

# What two runs share when their questions can be paired. The model and how it is served are what differs.
_SHARED = ("questions", "prompt", "max_tokens", "temperature", "stop")


@dataclass(frozen=True)
class Paired:
    """Attributes:
    pairs: questions that both runs have a reply to.
    lost: right in the baseline only.
    gained: right in the other run only.
    difference: accuracy of the other run minus the baseline's, over the pairs; None without pairs.
    interval: of the difference, at 95%.
    p_value: two-sided, McNemar's exact test.
    """

    pairs: int
    lost: int
    gained: int
    difference: float | None
    interval: tuple[float, float] | None
    p_value: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_comparable(baseline: Mapping[str, Any], identity: Mapping[str, Any], name: str) -> None:
    """Raises InputError: the runs were not asked the same in the same way; `name` is the baseline's file."""
    for key in _SHARED:
        if baseline.get(key) != identity.get(key):
            raise InputError(f"{name}: {key}: {baseline.get(key)}, expected as in the other run: {identity.get(key)}")


def compare(baseline: Results, other: Results, parse: Parse) -> Paired:
    """Pair the questions of two complete runs.

    Raises:
        InputError: see `check_comparable`, or a run is unfinished.
    """
    check_comparable(baseline.identity, other.identity, str(baseline.path))
    for run in (baseline, other):
        run.check_complete()
    before, after = baseline.outcomes(parse), other.outcomes(parse)
    pairs = [
        (before[index] is Outcome.CORRECT, after[index] is Outcome.CORRECT)
        for index in sorted(before)
        if Outcome.ERROR not in (before[index], after[index])
    ]
    return paired(len(pairs), pairs.count((True, False)), pairs.count((False, True)))


def paired(pairs: int, lost: int, gained: int) -> Paired:
    """The statistics of counted pairs."""
    if not pairs:
        return Paired(0, 0, 0, None, None, 1.0)
    discordant = lost + gained
    p_value = float(binomtest(lost, discordant, 0.5).pvalue) if discordant else 1.0
    return Paired(pairs, lost, gained, (gained - lost) / pairs, _interval(pairs, lost, gained), p_value)


def _interval(pairs: int, lost: int, gained: int) -> tuple[float, float]:
    n, discordant = pairs + 2, lost + gained + 1
    centre = (gained - lost) / n
    half = float(norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(discordant - n * centre**2) / n
    return max(-1.0, centre - half), min(1.0, centre + half)
