"""Distributions of magnitudes and the scales that follow from them, against values counted one by one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_statistics import observe
from tolerances import FP8_HISTOGRAM_ERROR, FP8_HISTOGRAM_PERCENTILE

from vllm_gemma4q.fp8_static import e4m3
from vllm_gemma4q.fp8_static.magnitudes import WeightCounter, from_histogram
from vllm_gemma4q.fp8_static.scales import NEUTRAL_SCALE, SMALLEST_SCALE, Rule, align, choose_scale

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def weight(dtype=BF16, seed=0, shape=(64, 96)):
    return torch.empty(shape).normal_(std=0.02, generator=torch.Generator().manual_seed(seed)).to(dtype)


def counted(values):
    counter = WeightCounter(values.dtype)
    for block in values.split(5):
        counter.add(block)
    return counter.magnitudes()


def squared_error(values, scale):
    return float((values.double().abs() - e4m3.round_trip(values.abs(), scale).double()).square().sum())


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_weights_are_counted_exactly(dtype):
    values = weight(dtype)
    found = counted(values)
    distinct, counts = values.double().abs().unique(return_counts=True)
    assert found.values.tolist() == distinct.tolist()
    assert found.counts.tolist() == counts.tolist()
    assert found.absmax == float(values.abs().max())
    for scale in (found.absmax / 448, found.absmax / 100, found.absmax / 2000):
        assert found.squared_error(scale) == pytest.approx(squared_error(values, scale), rel=1e-12)
        assert found.clipped(scale) == int((values.double().abs() > 448 * scale * (1 + 2**-20)).sum())
        zeros = (e4m3.quantize(values, scale).float() == 0) & (values != 0)
        assert found.underflowed(scale) == int(zeros.sum())


def test_float32_weights_keep_their_exact_absmax():
    values = weight(F32)
    values[3, 3] = 0.123456789
    found = counted(values)
    assert found.absmax == float(np.float32(0.123456789))
    assert found.counts.sum() == values.numel()


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_weights_that_are_not_finite_are_refused(dtype, bad):
    values = weight(dtype)
    values[63, 95] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        counted(values)


@pytest.mark.parametrize("rule", Rule)
def test_scales_of_zeros_and_of_nothing(rule):
    assert choose_scale(counted(torch.zeros(4, 4, dtype=BF16)), rule) == 0
    assert choose_scale(counted(torch.zeros(0, 4, dtype=BF16)), rule) == 0


def test_a_scale_is_a_normal_float32():
    tiny = torch.full((4, 4), 2.0**-130, dtype=BF16)
    assert choose_scale(counted(tiny), Rule.ABSMAX) == SMALLEST_SCALE
    scale = choose_scale(counted(weight()), Rule.ABSMAX)
    assert scale == float(np.float32(scale)) == float(np.float32(float(weight().abs().max()) / 448))


def test_absmax_clips_nothing():
    for seed in range(50):
        found = counted(weight(seed=seed, shape=(8, 8)))
        assert found.clipped(choose_scale(found, Rule.ABSMAX)) == 0


def test_percentile_leaves_out_the_stated_share():
    values = weight(shape=(400, 500))
    values[0, :10] = 5.0
    found = counted(values)
    scale = choose_scale(found, Rule.PERCENTILE)
    ascending = values.double().abs().flatten().sort().values
    assert scale == float(np.float32(ascending[math.ceil(0.9999 * len(ascending)) - 1] / 448))
    assert 0 < found.clipped(scale) <= values.numel() * 1e-4


def test_mse_is_the_best_of_its_candidates():
    values = weight()
    found = counted(values)
    chosen = choose_scale(found, Rule.MSE)
    absmax = found.absmax / 448
    assert absmax / 4 <= chosen <= absmax * 2
    errors = {step: squared_error(values, np.float32(absmax * 2 ** (step / 16))) for step in range(-32, 17)}
    assert squared_error(values, chosen) == pytest.approx(min(errors.values()), rel=1e-9)
    assert squared_error(values, chosen) < squared_error(values, absmax)


def drawn_inputs():
    rng = np.random.default_rng(0)
    return np.concatenate([rng.standard_normal((4000, 16)), rng.standard_normal((40, 16)) * 30]).astype(np.float32)


@pytest.mark.parametrize("corruption", [1.0, 1.1])
def test_histograms_stand_for_the_values_they_count(corruption):
    values = drawn_inputs()
    inputs = observe([values * np.float32(corruption)])
    found = from_histogram(inputs.histogram[0], float(inputs.absmax.max()))
    assert found.counts.sum() == pytest.approx(values.size)
    assert found.values.max() <= found.absmax
    assert (np.diff(found.values) >= 0).all()
    tensor, absmax = torch.from_numpy(values), float(np.abs(values).max())
    deviations = [abs(found.percentile(share) / np.quantile(np.abs(values), share) - 1) for share in (0.5, 0.9, 0.999)]
    assert (max(deviations) < FP8_HISTOGRAM_PERCENTILE) == (corruption == 1)
    for factor in (1.0, 1.4, 1.9):
        scale = absmax / 448 * factor
        deviation = abs(found.squared_error(scale) / squared_error(tensor, scale) - 1)
        assert (deviation < FP8_HISTOGRAM_ERROR) == (corruption == 1), (factor, deviation)


def test_clipped_inputs_are_counted_to_a_bin():
    values = drawn_inputs()
    inputs = observe([values])
    found = from_histogram(inputs.histogram[0], float(inputs.absmax.max()))
    for limit in (1.0, 3.0, 20.0):
        inside, outside = np.abs(values) > limit * 1.125, np.abs(values) > limit / 1.125
        assert inside.sum() <= found.clipped(limit / 448) <= outside.sum()


def test_values_outside_the_histogram_are_kept():
    values = np.array([[0.0, 2.0**-30, 1.0, 2.0**20]], np.float32)
    inputs = observe([values])
    found = from_histogram(inputs.histogram[0], float(inputs.absmax.max()))
    assert found.counts.sum() == 4
    assert found.values.max() <= 2.0**20
    assert choose_scale(found, Rule.ABSMAX) == float(np.float32(2.0**20 / 448))


@given(st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=1, max_size=4))
def test_aligned_scales_are_powers_of_two_apart(scales):
    aligned = align(scales)
    largest = max(scales)
    for before, after in zip(scales, aligned, strict=True):
        assert before <= after < 2 * before or after == before
        assert math.log2(largest / after).is_integer()
    assert max(aligned) == largest


def test_shards_of_zeros_take_the_largest():
    assert align([0.25, 0.0, 0.1]) == [0.25, 0.25, 0.125]
    assert align([0.0, 0.0]) == [NEUTRAL_SCALE] * 2


def test_requantizing_aligned_shards_to_the_largest_loses_nothing():
    """What stock vLLM does to fused linears: dequantize, then quantize with the largest scale."""
    small, large = weight(seed=1) / 5, weight(seed=2)
    own = [choose_scale(counted(values), Rule.ABSMAX) for values in (small, large)]
    first, second = align(own)
    assert second == own[1] > first
    codes = e4m3.quantize(small, first)
    again = e4m3.round_trip(e4m3.round_trip(small, first), second)
    normal = (codes.float().abs() * first / second) >= 2**-6
    assert torch.equal(again[normal], (codes.float() * first)[normal])
    unaligned = e4m3.round_trip(e4m3.round_trip(small, own[0]), second)
    assert not torch.equal(unaligned[normal], e4m3.round_trip(small, own[0])[normal])
