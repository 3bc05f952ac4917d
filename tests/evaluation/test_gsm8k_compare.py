"""Wilson's interval, McNemar's exact test and the interval of a difference: published values, and coverage."""

import math
from collections import Counter

import pytest
from scipy.special import gammaln

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.gsm8k.answers import Outcome, Parse, Reply
from vllm_gemma4q.evaluation.gsm8k.compare import compare, paired
from vllm_gemma4q.evaluation.gsm8k.results import Results
from vllm_gemma4q.evaluation.gsm8k.score import Score, score


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998), table I
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(correct, total, low, high):
    interval = Score(Counter({Outcome.CORRECT: correct, Outcome.WRONG: total - correct})).interval
    assert [round(bound, 4) for bound in interval] == [low, high]


def test_errors_are_no_part_of_the_accuracy():
    kinds = [Outcome.CORRECT] * 3 + [Outcome.WRONG, Outcome.TRUNCATED, Outcome.EMPTY] + [Outcome.ERROR] * 4
    found = score(kinds)
    assert (found.replies, found.accuracy) == (6, 0.5)
    nothing = score([Outcome.ERROR])
    assert (nothing.replies, nothing.accuracy, nothing.interval) == (0, None, None)


@pytest.mark.parametrize(("lost", "gained"), [(10, 2), (2, 10), (0, 5), (7, 7), (0, 0), (1, 0)])
def test_mcnemar_is_the_sign_test_on_what_changed(lost, gained):
    """By its definition: twice the binomial tail of the smaller count, at most 1."""
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n
    found = paired(100, lost, gained)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))
    assert found.difference == (gained - lost) / 100
    low, high = found.interval
    assert low < found.difference < high


def test_interval_turns_with_the_runs():
    low, high = paired(200, 12, 5).interval
    assert paired(200, 5, 12).interval == pytest.approx((-high, -low))


@pytest.mark.parametrize("wider", [1.0, 2 / 3], ids=["as it is", "a third too narrow"])
@pytest.mark.parametrize(("lost", "gained"), [(0.05, 0.05), (0.1, 0.03), (0.02, 0.2)])
def test_interval_covers_the_true_difference(lost, gained, wider):
    """Over all tables of 40 pairs, the interval holds the truth with 95%, and with less if it were narrower."""
    n, truth, covered = 40, gained - lost, 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            low, high = paired(n, b, c).interval
            middle, half = (low + high) / 2, wider * (high - low) / 2
            if abs(truth - middle) <= half:
                rest = n - b - c
                log = gammaln(n + 1) - gammaln(b + 1) - gammaln(c + 1) - gammaln(rest + 1)
                covered += math.exp(
                    log + b * math.log(lost) + c * math.log(gained) + rest * math.log(1 - lost - gained)
                )
    assert (0.94 <= covered <= 0.99) == (wider == 1.0)


def run(tmp_path, name, texts, **identity):
    replies = {index: Reply(error="HTTP 500") if text is None else Reply(text) for index, text in enumerate(texts)}
    shared = {"questions": {"sha256": "a", "count": 4}, "prompt": {}, "max_tokens": 9, "temperature": 0.0, "stop": []}
    return Results(tmp_path / name, {**shared, **identity}, replies, dict.fromkeys(replies, "1"))


def test_pairs_are_by_question_and_leave_out_errors(tmp_path):
    before = run(tmp_path, "before", ["#### 1", "#### 1", "#### 2", "#### 1"], model="a")
    after = run(tmp_path, "after", ["#### 1", "the 1", "#### 1", None], model="b")
    strict, flexible = (compare(before, after, parse) for parse in Parse)
    assert (strict.pairs, strict.lost, strict.gained) == (3, 1, 1)
    assert (flexible.pairs, flexible.lost, flexible.gained) == (3, 0, 1)
    assert flexible.difference == pytest.approx(1 / 3)


def test_runs_that_cannot_be_paired_are_refused(tmp_path):
    before = run(tmp_path, "before", ["#### 1"] * 4)
    with pytest.raises(InputError, match=r"before: max_tokens: 9, expected as in the other run: 8"):
        compare(before, run(tmp_path, "after", ["#### 1"] * 4, max_tokens=8), Parse.STRICT)
    with pytest.raises(InputError, match=r"after: 1 of 4 questions unanswered"):
        compare(before, run(tmp_path, "after", ["#### 1"] * 3), Parse.STRICT)
    nothing = compare(before, run(tmp_path, "after", [None] * 4), Parse.STRICT)
    assert (nothing.pairs, nothing.difference, nothing.interval, nothing.p_value) == (0, None, None, 1.0)
