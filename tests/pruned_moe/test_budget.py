"""The best of each layer, and budgets spread over layers: exact, against every way to spread a small one."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.pruned_moe.budget import probe_counts, probes, spread
from vllm_gemma4q.pruned_moe.select import best


def names(layer, counts):
    return [f"layer {layer}, {count} experts" for count in counts]


def losses_of(curves, counts):
    return {
        name: loss for layer, curve in enumerate(curves) for name, loss in zip(names(layer, counts), curve, strict=True)
    }


def test_best_of_each_layer_and_ties_by_number():
    scores = np.array([[1, 3, 2, 3.0], [0, 0, 0, 0.0], [-1, -4, -2, -3.0]])
    assert best(scores, [2, 3, 1]).kept == ((1, 3), (0, 1, 2), (0,))
    assert best(scores, [1, 4, 2]).kept == ((1,), (0, 1, 2, 3), (0, 2))


@pytest.mark.parametrize("count", [0, 5])
def test_counts_out_of_range(count):
    with pytest.raises(InputError, match=f"layer 1: got {count} experts to keep, expected 1..4"):
        best(np.zeros((2, 4)), [2, count])


@pytest.mark.parametrize(
    ("num_experts", "top_k", "keep", "expected"),
    [
        (128, 8, 98, [76, 90, 106, 120]),
        (16, 4, 12, [9, 11, 13, 15]),
        (16, 4, 5, [4, 8, 13]),
        (16, 4, 15, [14, 15]),
        (16, 4, 16, [15]),
        (8, 8, 8, [8]),
    ],
)
def test_counts_to_measure(num_experts, top_k, keep, expected):
    found = probe_counts(num_experts, top_k, keep)
    assert found == expected
    assert min(found) <= keep


def test_probes_prune_one_layer_each():
    scores = np.random.default_rng(0).random((3, 8))
    found = probes(scores, [5, 6])
    assert list(found) == [name for layer in range(3) for name in names(layer, [5, 6])]
    for layer, count in itertools.product(range(3), (5, 6)):
        counts = [8, 8, 8]
        counts[layer] = count
        assert found[f"layer {layer}, {count} experts"] == best(scores, counts)


def by_hand(curves, counts, num_experts, total):
    """Least sum of losses over every way to spread, with straight lines between what was measured."""

    def loss(curve, count):
        points = [*zip(counts, curve, strict=True), (num_experts, 0.0)]
        for (low, before), (high, after) in itertools.pairwise(points):
            if low <= count <= high:
                return before + (after - before) * (count - low) / (high - low)
        raise AssertionError(count)

    ways = itertools.product(range(min(counts), num_experts + 1), repeat=len(curves))
    return min(sum(map(loss, curves, way)) for way in ways if sum(way) == total)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_spread_is_the_least_sum_of_losses(data):
    num_experts, n_layers = data.draw(st.integers(4, 7)), data.draw(st.integers(1, 3))
    counts = sorted(data.draw(st.sets(st.integers(1, num_experts - 1), min_size=1, max_size=3)))
    loss = st.integers(0, 40).map(lambda value: value / 8)  # with ties, and not monotone
    curves = data.draw(st.lists(st.tuples(*[loss] * len(counts)), min_size=n_layers, max_size=n_layers))
    total = data.draw(st.integers(n_layers * counts[0], n_layers * num_experts))
    found = spread(losses_of(curves, counts), n_layers, counts, num_experts, total)
    assert sum(found) == total
    assert all(counts[0] <= count <= num_experts for count in found)
    costs = [
        np.interp(count, [*counts, num_experts], [*curve, 0.0]) for count, curve in zip(found, curves, strict=True)
    ]
    assert sum(costs) == pytest.approx(by_hand(curves, counts, num_experts, total), abs=1e-9)


def test_more_experts_where_dropping_costs_more():
    found = spread(losses_of([(0.4, 0.1), (0.04, 0.01), (4.0, 1.0)], [8, 12]), 3, [8, 12], 16, 36)
    assert found == [12, 8, 16]
    assert spread(losses_of([(1.0, 0.25)] * 3, [8, 12]), 3, [8, 12], 16, 36) == [12, 12, 12]


@pytest.mark.parametrize("total", [23, 49])
def test_totals_that_cannot_be(total):
    losses = losses_of([(1.0, 0.5)] * 3, [8, 12])
    with pytest.raises(InputError, match=f"got {total} experts to spread, expected 24..48"):
        spread(losses, 3, [8, 12], 16, total)
    for possible in (24, 48):
        assert sum(spread(losses, 3, [8, 12], 16, possible)) == possible
