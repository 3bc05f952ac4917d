"""INT8 quantization of weights and activations: the rules to the bit, their bounds, refusals, memory."""

import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from gemma4q_kernels.int8_scaled_mm import quantize_per_channel, quantize_per_token
from hypothesis import given, settings

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SCALE_MIN = 2.0**-23

# amd-quark 0.13, Int8PerChannelSpec(symmetric=True, ch_axis=0), file to file, on `quark_example`.
QUARK = {
    torch.bfloat16: (
        [
            [-127, -27, 74, -81, 19, 119, -36, 64, -90, 10],
            [-104, 12, 127, -52, 64, -115, 1, 117, -62, 54],
            [-21, 18, -42, -3, 36, -24, 15, -45, -7, 32],
            [0] * 10,
        ],
        [0.001007080078125, 0.001739501953125, SCALE_MIN, SCALE_MIN],
    ),
    torch.float32: (
        [
            [-128, -27, 74, -82, 19, 120, -36, 65, -91, 10],
            [-105, 11, 127, -52, 64, -115, 1, 117, -62, 54],
            [-21, 18, -42, -3, 36, -24, 15, -45, -7, 32],
            [0] * 10,
        ],
        [0.0010039216140285134, 0.0017411764711141586, SCALE_MIN, SCALE_MIN],
    ),
}


def quark_example(dtype: torch.dtype) -> torch.Tensor:
    """Four rows: ordinary, ordinary, tiny (below what the smallest scale resolves well), zero."""
    i, j = torch.arange(4).view(-1, 1), torch.arange(10)
    weight = (((i * 37 + j * 101) % 257 - 128) * (i + 1) / 1000).to(dtype)
    weight[2] *= 2.0**-16
    weight[3] = 0
    return weight


@pytest.mark.parametrize("dtype", QUARK, ids=str)
def test_weights_match_quark_to_the_bit(dtype: torch.dtype) -> None:
    q, scale = quantize_per_channel(quark_example(dtype))
    expected_q, expected_scale = QUARK[dtype]
    assert q.tolist() == expected_q
    assert scale.dtype == torch.float32
    assert scale.tolist() == expected_scale


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    magnitude = draw(st.integers(-30, 7))
    values = rng.standard_normal((rows, columns)) * 2.0 ** (magnitude + rng.integers(-4, 5, (rows, 1)))
    values[rng.random((rows, columns)) < draw(st.sampled_from((0.0, 0.5, 1.0)))] = 0
    return torch.from_numpy(values).to(draw(st.sampled_from(FLOATS)))


@settings(max_examples=150, deadline=None)
@given(matrices())
def test_weight_round_trip(weight: torch.Tensor) -> None:
    q, scale = quantize_per_channel(weight)
    absmax = weight.float().abs().amax(dim=1)
    step = torch.from_numpy(absmax.numpy() / np.float32(127.5))
    if weight.dtype == torch.bfloat16:
        step = step.bfloat16().float()
    assert torch.equal(scale, step.clamp_min(SCALE_MIN))
    error = (weight.double() - q.double() * scale.double().unsqueeze(1)).abs() / scale.double().unsqueeze(1)
    clipped = q == 127  # the largest code also stands for values up to 127.75 steps
    assert bool((error[~clipped] <= 0.5 * (1 + 2**-14)).all())
    assert bool((error[clipped] <= 0.75 * (1 + 2**-14)).all())
    assert bool((q[weight == 0] == 0).all())


@settings(max_examples=150, deadline=None)
@given(matrices())
def test_token_round_trip(x: torch.Tensor) -> None:
    q, scale = quantize_per_token(x)
    absmax = x.float().abs().amax(dim=1, keepdim=True).numpy()
    assert torch.equal(scale, torch.from_numpy(np.maximum(absmax, np.float32(1e-10)) / np.float32(127)))
    assert int(q.min()) >= -127
    error = (x.double() - q.double() * scale.double()).abs() / scale.double()
    assert bool((error <= 0.5 * (1 + 2**-14)).all())


def test_a_wrong_scale_breaks_the_round_trip() -> None:
    weight = torch.linspace(-1, 1, 300).view(3, 100)
    q, scale = quantize_per_channel(weight)
    steps = (weight.double() - q.double() * scale.double().unsqueeze(1) * 1.1).abs() / scale.double().unsqueeze(1)
    assert float(steps.max()) > 0.75


def test_halves_round_to_even() -> None:
    weight = torch.tensor([[127.5, 0.5, 1.5, 2.5, -0.5, -1.5, -127.5]])
    assert quantize_per_channel(weight)[0].tolist() == [[127, 0, 2, 2, 0, -2, -128]]
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]])
    assert quantize_per_token(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -127]]


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (1, 1), (3, 500_000)], ids=str)
def test_unusual_shapes(shape: tuple[int, int], poisoned_memory: None) -> None:
    weight = torch.linspace(-1, 1, shape[0] * shape[1]).view(shape)
    q, scale = quantize_per_channel(weight)
    assert q.shape == shape and scale.shape == shape[:1]
    assert bool(scale.isfinite().all())
    assert bool(((weight - q * scale.unsqueeze(1)).abs() <= 0.76 * scale.unsqueeze(1)).all())


def test_row_blocks_and_strides_do_not_matter(poisoned_memory: None) -> None:
    weight = torch.randn(700, 1500, generator=torch.Generator().manual_seed(0)).bfloat16()  # three blocks of rows
    q, scale = quantize_per_channel(weight)
    rows = [quantize_per_channel(row.unsqueeze(0)) for row in weight]
    assert torch.equal(q, torch.cat([row for row, _ in rows]))
    assert torch.equal(scale, torch.cat([row for _, row in rows]))
    transposed = quantize_per_channel(weight.t().contiguous().t())
    assert torch.equal(q, transposed[0]) and torch.equal(scale, transposed[1])


def test_out_is_written_in_place() -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    stacked = torch.full((2, 5, 7), 99, dtype=torch.int8), torch.full((2, 5), -1.0)
    quantize_per_channel(weight, out=(stacked[0][1], stacked[1][1]))
    q, scale = quantize_per_channel(weight)
    assert torch.equal(stacked[0][1], q) and torch.equal(stacked[1][1], scale)
    assert bool((stacked[0][0] == 99).all()) and bool((stacked[1][0] == -1).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_non_finite_weights_are_refused(dtype: torch.dtype, value: float) -> None:
    weight = torch.zeros(700, 1500, dtype=dtype)
    weight[601, 3] = weight[600, 1499] = weight[699, 0] = value
    with pytest.raises(ValueError, match=r"got 3 NaN or infinite values, the first at \[600, 1499\]"):
        quantize_per_channel(weight)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="overflow float32"):
        quantize_per_channel(torch.full((1, 2), 1e300, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got torch.int8 \(2, 2\), expected a float matrix"):
        quantize_per_channel(torch.zeros(2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"got torch.float32 \(2,\), expected a float matrix"):
        quantize_per_token(torch.zeros(2))
    with pytest.raises(ValueError, match=r"out: got torch.float32 \(3,\), expected torch.float32 \(2,\)"):
        quantize_per_channel(torch.zeros(2, 2), out=(torch.zeros(2, 2, dtype=torch.int8), torch.zeros(3)))


def test_a_non_finite_token_shows_in_its_scale() -> None:
    x = torch.ones(3, 4)
    x[1, 2] = float("nan")
    x[2, 0] = float("-inf")
    scale = quantize_per_token(x)[1].flatten()
    assert scale.isfinite().tolist() == [True, False, False]


PEAK = """
import sys, torch
from pathlib import Path
from gemma4q_kernels.int8_scaled_mm import quantize_per_channel
torch.set_num_threads(1)
def peak():
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
weight = torch.empty(4096, 5376, dtype=torch.bfloat16).uniform_(-1, 1)
out = torch.zeros(weight.shape, dtype=torch.int8), torch.zeros(len(weight))
quantize_per_channel(weight[:2], out=(out[0][:2], out[1][:2]))
Path("/proc/self/clear_refs").write_text("5")  # start a new peak here
before = peak()
quantize_per_channel(weight, out=out) if sys.argv[1] == "ours" else weight.float()
print((peak() - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_scratch_memory_is_bounded() -> None:
    def peak_mib(what: str) -> float:
        done = subprocess.run([sys.executable, "-c", PEAK, what], capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert peak_mib("ours") < 16  # of a weight of 42 MiB
    assert peak_mib("a float32 copy") > 64  # the measurement sees what it should
