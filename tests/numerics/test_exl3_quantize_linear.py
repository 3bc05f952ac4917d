"""One linear to EXL3: what is reported is what decodes, feedback pays, padding, extremes, refusals."""

import importlib
import subprocess
import sys

import pytest
import torch
from exl3_weights import dense
from gemma4q_kernels.exl3 import Quantized, linear, peak_bytes, quantize_linear
from gemma4q_kernels.exl3.ldlq import encode_with_feedback, feedback_factor
from gemma4q_kernels.exl3.regularize import regularize
from tolerances import (
    EXL3_BLOCK_DEVIATION,
    EXL3_FACTOR,
    EXL3_FEEDBACK,
    EXL3_GAUSSIAN,
    EXL3_REPORTED,
    EXL3_SCALED,
    rms_error,
)


def decoded(quantized: Quantized, like: torch.Tensor) -> torch.Tensor:
    """The weight as torch's linears hold it, float64."""
    return dense(quantized.weight, torch.float32).t()[: like.shape[0], : like.shape[1]].double()


def correlated(count: int, features: int) -> torch.Tensor:
    """Second moments of inputs of which a few directions hold nearly all."""
    inputs = torch.randn(count, features // 8) @ torch.randn(features // 8, features) + 0.3 * torch.randn(
        count, features
    )
    return inputs.t() @ inputs


def uneven(outputs: int, inputs: int) -> torch.Tensor:
    return torch.randn(outputs, inputs) * 0.03 * (0.2 + torch.rand(outputs, 1)) * (0.2 + torch.rand(inputs))


def by_outputs(error: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((error @ hessian.double()) * error).sum())


@pytest.mark.parametrize(("bits", "codebook"), [(4, "mcg"), (1, "3inst"), (2.5, "mul1"), (8, "mcg")])
def test_what_is_reported_is_what_decodes(bits: float, codebook: str) -> None:
    weight, hessian = uneven(70, 150), correlated(400, 150)
    done: list[int] = []
    got = quantize_linear(weight, hessian, bits, codebook, progress=done.append)
    assert (got.weight.in_features, got.weight.out_features, got.weight.bits) == (256, 128, bits)
    assert got.weight.codebook == codebook and sum(done) == weight.numel() and min(done) >= 0
    error, exact = decoded(got, weight) - weight, weight.double()
    assert got.nmse == pytest.approx(float(error.square().sum() / exact.square().sum()), rel=EXL3_REPORTED)
    assert got.proxy == pytest.approx(by_outputs(error, hessian) / by_outputs(exact, hessian), rel=EXL3_REPORTED)
    assert got.nmse != pytest.approx(float(error.square().sum() / exact.square().sum()) * 1.1, rel=EXL3_REPORTED)
    plain = quantize_linear(weight, None, bits, codebook)
    assert plain.proxy == plain.nmse < got.nmse


@pytest.mark.parametrize("bits", [3, 4])
def test_gaussian_weights_are_encoded_as_well_as_published(bits: int) -> None:
    weight = torch.randn(128, 128)
    got = quantize_linear(weight, None, bits)
    assert 4.0**-bits < got.nmse <= EXL3_GAUSSIAN[bits]


def test_feedback_pays_where_inputs_are_correlated() -> None:
    """By how much depends on the inputs; with the moments of other inputs it does not."""
    weight, hessian = uneven(128, 256), correlated(600, 256)
    blind, led = quantize_linear(weight, None, 3), quantize_linear(weight, hessian, 3)
    error = decoded(blind, weight) - weight
    without = by_outputs(error, hessian) / by_outputs(weight.double(), hessian)
    assert led.proxy <= EXL3_FEEDBACK * without
    misled = quantize_linear(weight, hessian.roll((16, 16), (0, 1)), 3)
    error = decoded(misled, weight) - weight
    assert by_outputs(error, hessian) / by_outputs(weight.double(), hessian) > EXL3_FEEDBACK * without


def test_feedback_is_what_its_definition_says() -> None:
    """M = L D L^T, and blocks of inputs from the last to the first, each behind the errors of all later ones."""
    moments, weight = correlated(600, 256), uneven(64, 256).t()
    factor = feedback_factor(moments.clone)
    exact = moments.double() + 0.025 * moments.double().diagonal().mean() * torch.eye(256)
    diagonal = torch.zeros(256, 256, dtype=torch.float64)
    expected = torch.zeros(256, 64, dtype=torch.float64)
    lower = torch.eye(256, dtype=torch.float64)
    for start in reversed(range(0, 256, 16)):
        block, later = slice(start, start + 16), slice(start + 16, 256)
        schur = exact[block, block] - exact[block, :start] @ exact[:start, :start].inverse() @ exact[:start, block]
        rest = exact[later, block] - exact[later, :start] @ exact[:start, :start].inverse() @ exact[:start, block]
        diagonal[block, block], lower[later, block] = schur, rest @ schur.inverse()
        aim = weight[block] + lower[later, block].t() @ (weight[later] - expected[later])
        expected[block] = 0.9 * aim
    assert rms_error(factor, lower) <= EXL3_FACTOR
    assert rms_error(factor.double() @ diagonal @ factor.double().t(), exact) <= EXL3_FACTOR
    got = torch.empty(256, 64)

    def shrink(rows: slice, aim: torch.Tensor) -> torch.Tensor:
        got[rows] = 0.9 * aim
        return got[rows]

    encode_with_feedback(lambda rows: weight[rows], (256, 64), factor, shrink)
    assert rms_error(got, expected) <= EXL3_FACTOR
    encode_with_feedback(lambda rows: weight[rows], (256, 64), factor * 1.1, shrink)
    assert rms_error(got, expected) > EXL3_FACTOR
    encode_with_feedback(lambda rows: weight[rows], (256, 64), None, shrink)
    assert torch.equal(got, 0.9 * weight)


def test_every_block_has_the_same_deviation() -> None:
    """A block of which half is padding as well: the scale that is searched for is one for all."""
    weight = uneven(200, 320)
    regular = regularize(weight.t(), 0)
    rotated = regular.rotated(regular.input_scales, *(slice(0, size) for size in regular.shape))
    deviations = rotated.view(3, 128, 2, 128).square().mean(dim=(1, 3)).sqrt()
    assert deviations.shape == (3, 2) and float((deviations - 1).abs().max()) <= EXL3_BLOCK_DEVIATION
    assert float((deviations * 1.1 - 1).abs().max()) > EXL3_BLOCK_DEVIATION


def test_moments_have_no_scale_and_may_be_unknown() -> None:
    weight, hessian = uneven(128, 128), correlated(300, 128)
    led = quantize_linear(weight, hessian, 3)
    scaled = quantize_linear(weight, hessian * 2.0**20, 3)
    assert torch.equal(led.weight.trellis, scaled.weight.trellis)
    unknown, none = quantize_linear(weight, torch.zeros(128, 128), 3), quantize_linear(weight, None, 3)
    assert torch.equal(unknown.weight.trellis, none.weight.trellis) and unknown.proxy == none.proxy
    assert not torch.equal(led.weight.trellis, none.weight.trellis)


def test_inputs_that_were_never_seen_do_no_harm() -> None:
    """Fewer samples than inputs, one input always zero: moments without full rank."""
    weight, inputs = uneven(64, 192), torch.randn(20, 192)
    inputs[:, 7] = 0
    got = quantize_linear(weight, inputs.t() @ inputs, 4)
    assert 0 < got.proxy < got.nmse < 0.1


def test_zeros_stay_zeros() -> None:
    weight = uneven(130, 100)
    weight[5], weight[:, 17] = 0, 0
    got = quantize_linear(weight, correlated(300, 100), 4)
    matrix = dense(got.weight, torch.float32).t()
    assert matrix.shape == (256, 128) and got.nmse < 0.02
    assert not matrix[130:].any() and not matrix[:, 100:].any() and not matrix[5].any() and not matrix[:, 17].any()
    assert not got.weight.svh[130:].any() and bool(got.weight.svh[:5].all())
    x = torch.randn(3, 128)
    assert not linear(x, [got.weight])[:, 130:].any()
    nothing = quantize_linear(torch.zeros(128, 128), None, 2)
    assert nothing.nmse == nothing.proxy == 0 and not dense(nothing.weight).any()


@pytest.mark.parametrize("scale", [2.0**-24, 2.0**-10, 2.0**12])
def test_small_and_large_weights(scale: float) -> None:
    weight = uneven(128, 128)
    expected, got = quantize_linear(weight, None, 4), quantize_linear(weight * scale, None, 4)
    assert got.nmse == pytest.approx(expected.nmse, rel=EXL3_SCALED)
    assert got.nmse != pytest.approx(expected.nmse * 1.1, rel=EXL3_SCALED)


def test_the_seed_decides() -> None:
    weight, hessian = uneven(128, 128), correlated(300, 128)
    first, again, other = (quantize_linear(weight, hessian, 2, seed=seed) for seed in (3, 3, 4))
    for name in ("trellis", "suh", "svh"):
        assert torch.equal(getattr(first.weight, name), getattr(again.weight, name))
        assert not torch.equal(getattr(first.weight, name), getattr(other.weight, name))
    assert (first.nmse, first.proxy) == (again.nmse, again.proxy)
    assert 0.4 < float((first.weight.suh > 0).float().mean()) < 0.6


def test_weights_of_two_bytes_and_views() -> None:
    weight = uneven(128, 256).bfloat16()
    got = quantize_linear(weight.t().contiguous().t(), None, 2)
    assert torch.equal(got.weight.trellis, quantize_linear(weight.float(), None, 2).weight.trellis)


def test_outputs_in_parts_are_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an output layer there are eight of them; the last is smaller, and ends within a block."""
    weight, hessian = uneven(600, 150), correlated(400, 150)
    whole = quantize_linear(weight, hessian, 2)
    monkeypatch.setattr(importlib.import_module("gemma4q_kernels.exl3.quantize"), "_ENCODED", 256)
    done: list[int] = []
    parts = quantize_linear(weight, hessian, 2, progress=done.append)
    for name in ("trellis", "suh", "svh"):
        assert torch.equal(getattr(parts.weight, name), getattr(whole.weight, name))
    assert (parts.nmse, parts.proxy) == (whole.nmse, whole.proxy)
    assert sum(done) == weight.numel() and len(done) == 3 * 256 // 16


# What a process has after a first, small linear, and its most while it does one of a given shape: both with the
# weight and the Hessian.
PEAK = """
import sys, threading, time
import psutil, torch
from gemma4q_kernels.exl3 import quantize_linear
outputs, inputs = map(int, sys.argv[1:])
quantize_linear(torch.randn(128, 128).bfloat16(), torch.eye(128), 1)
process, peak = psutil.Process(), 0
before = process.memory_info().rss
def watch():
    global peak
    while True:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
weight = torch.empty((outputs, inputs), dtype=torch.bfloat16).normal_()
quantize_linear(weight, torch.eye(inputs), 1)
print(peak - before)
"""


@pytest.mark.slow
def test_memory_is_what_is_said() -> None:
    """Where Hessians weigh most, as in down_proj."""
    command = [sys.executable, "-c", PEAK, "256", "6144"]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.6 * peak_bytes((256, 6144), 1, True) < peak < peak_bytes((256, 6144), 1, True)


def test_memory_of_the_largest_linears() -> None:
    """Of the 31B: 5 GB each, as measured; the output layer in float32 alone would be 5.6."""
    head, down = peak_bytes((262144, 5376), 6, True), peak_bytes((5376, 21504), 4, True)
    assert 4.5e9 < head < 5.5e9 and 4.5e9 < down < 5.5e9 < peak_bytes((5376, 21504), 4, True, "cuda")


WEIGHT, MOMENTS = torch.ones(128, 64), torch.eye(64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((WEIGHT.int(), None, 4), "weight: got torch.int32 (128, 64), expected float [out, in]"),
        ((WEIGHT[0], None, 4), "weight: got torch.float32 (64,)"),
        ((WEIGHT[:0], None, 4), "weight: got torch.float32 (0, 64)"),
        ((WEIGHT * 1e12, None, 4), "weight: got magnitudes up to 1e+12, expected scales within float16"),
        ((WEIGHT * 1e30, None, 4), "weight: got magnitudes up to 1e+30, expected scales within float16"),
        ((WEIGHT / 0, None, 4), "weight: got NaN or infinity, expected finite numbers"),
        (
            (WEIGHT, MOMENTS[:32], 4),
            "hessian: got torch.float32 (32, 64) on cpu, expected torch.float32 [64, 64]",
        ),
        ((WEIGHT, MOMENTS.double(), 4), "hessian: got torch.float64 (64, 64)"),
        ((WEIGHT, MOMENTS * torch.nan, 4), "hessian: got NaN or infinity, expected finite numbers"),
        ((WEIGHT, -MOMENTS, 4), "hessian: no Cholesky factor"),
        ((WEIGHT, None, 1.5), "bits: got 1.5, expected one of 1, 2"),
        ((WEIGHT, None, 9, "mul1"), "bits: got 9, expected one of 1, 1.5, 2"),
        ((WEIGHT, None, 4, "MCG"), "codebook: got 'MCG'"),
    ],
)
def test_what_cannot_be_quantized_is_named(arguments: tuple[torch.Tensor, torch.Tensor, float], message: str) -> None:
    with pytest.raises(ValueError) as error:
        quantize_linear(*arguments)
    assert message in str(error.value)


def test_a_backend_that_cannot_run_is_refused_first() -> None:
    with pytest.raises(ValueError, match="backend: got 'gpu'"):
        quantize_linear(WEIGHT, None, 4, backend="gpu")
