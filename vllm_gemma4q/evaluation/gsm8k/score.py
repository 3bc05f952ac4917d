"""Accuracy of one run with its Wilson interval; what is not an answer counted apart."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from scipy.stats import binomtest

from vllm_gemma4q.evaluation.gsm8k.answers import Outcome

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """How many questions ended how. Questions that the server failed are no part of the accuracy."""

    counts: Counter[Outcome]

    @property
    def replies(self) -> int:
        """Questions with a reply, right or wrong, cut or empty."""
        return self.counts.total() - self.counts[Outcome.ERROR]

    @property
    def accuracy(self) -> float | None:
        """Correct ones of the replies; None without any."""
        return self.counts[Outcome.CORRECT] / self.replies if self.replies else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's, at 95%."""
        if not self.replies:
            return None
        found = binomtest(self.counts[Outcome.CORRECT], self.replies).proportion_ci(CONFIDENCE, method="wilson")
        return float(found.low), float(found.high)

    def to_json(self) -> dict[str, Any]:
        counts = {str(outcome): self.counts[outcome] for outcome in Outcome}
        return {"accuracy": self.accuracy, "interval": self.interval, "replies": self.replies, **counts}


def score(outcomes: Iterable[Outcome]) -> Score:
    """Count the outcomes of a run's questions."""
    return Score(Counter(outcomes))
