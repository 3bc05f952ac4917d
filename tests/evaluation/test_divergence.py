"""Divergence between two models' next-token scores: known values, and what it notices."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gemma4q.evaluation.divergence import divergence


def scores(*probabilities):
    return {token: math.log(p) if p else -math.inf for token, p in enumerate(probabilities)}


distributions = st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3).map(lambda w: scores(*(x / sum(w) for x in w)))


def test_known_value():
    result = divergence([scores(0.5, 0.5), scores(0.9, 0.1)], [scores(0.25, 0.75), scores(0.9, 0.1)])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert result.mean_kld == pytest.approx(expected / 2)
    assert result.same_top == 0.5
    assert result.positions == 2


@given(st.lists(st.tuples(distributions, distributions), min_size=2, max_size=5))
def test_never_negative_and_zero_only_for_equals(pairs):
    reference, other = zip(*pairs, strict=True)
    assert divergence(reference, other).mean_kld >= 0
    same = divergence(reference, reference)
    assert (same.mean_kld, same.same_top) == (0, 1)


def test_part_of_a_vocabulary_is_a_lower_bound():
    p, q = scores(0.5, 0.3, 0.15, 0.05), scores(0.3, 0.3, 0.2, 0.2)
    top = {token: p[token] for token in (0, 1)}
    q_top = {token: q[token] for token in (0, 1)}
    whole = divergence([p, p], [q, q]).mean_kld
    part = divergence([top, top], [q_top, q_top]).mean_kld
    assert 0 < part <= whole


def test_impossible_token_counts_as_nothing():
    assert divergence([scores(1.0, 0.0)] * 2, [scores(0.5, 0.5)] * 2).mean_kld == pytest.approx(math.log(2))


def test_nan_and_lengths_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        divergence([{0: math.nan}] * 2, [{0: 0.0}] * 2)
    with pytest.raises(ValueError, match="got 1, expected 2"):
        divergence([{0: 0.0}] * 2, [{0: 0.0}])
