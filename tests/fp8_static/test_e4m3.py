"""E4M3 rounding against torch's cast and against the format spelled out, bit for bit."""

import numpy as np
import pytest
import torch

from vllm_gemma4q.fp8_static import e4m3
from vllm_gemma4q.fp8_static.format import MAX, MIN_SUBNORMAL

CODES = torch.arange(256, dtype=torch.uint8)


def decoded(code):
    """A code's value, from the definition: sign, 4 bits of exponent biased by 7, 3 bits behind the point."""
    sign, exponent, fraction = -1 if code & 0x80 else 1, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    value = MIN_SUBNORMAL * fraction if exponent == 0 else 2.0 ** (exponent - 7) * (1 + fraction / 8)
    return sign * value


def test_constants_are_those_of_the_format():
    values = [decoded(code) for code in range(0x7F)]
    assert max(values) == MAX
    assert min(value for value in values if value) == MIN_SUBNORMAL
    assert decoded(0x08) == 2.0**-6
    assert torch.equal(CODES[:0x7F].view(torch.float8_e4m3fn).double(), torch.tensor(values, dtype=torch.float64))


def test_every_value_is_its_own_code():
    finite = CODES[(CODES & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    assert torch.equal(e4m3.quantize(finite.float(), 1.0).view(torch.uint8), finite.view(torch.uint8))


def test_halves_round_to_even_and_both_sides_of_them_apart():
    grid = np.array([decoded(code) for code in range(0x7F)])
    middle = (grid[:-1] + grid[1:]) / 2
    codes = np.arange(0x7E)
    cases = [
        (middle, np.where(codes % 2, codes + 1, codes)),
        (np.nextafter(middle.astype(np.float32), np.float32(0)), codes),
        (np.nextafter(middle.astype(np.float32), np.float32(np.inf)), codes + 1),
    ]
    for values, expected in cases:
        got = e4m3.quantize(torch.tensor(values, dtype=torch.float32), 1.0).view(torch.uint8)
        assert got.tolist() == expected.tolist()
        negative = e4m3.quantize(torch.tensor(-values, dtype=torch.float32), 1.0).view(torch.uint8)
        assert negative.tolist() == (expected | 0x80).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.0371, 3.3e-5, 17.0])
def test_equals_torch_with_saturation(dtype, scale):
    patterns = torch.arange(1 << 16, dtype=torch.int32)
    short = torch.float16 if dtype == torch.float16 else torch.bfloat16
    values = patterns.to(torch.int16).view(short).to(dtype)
    values = values[values.isfinite()]
    scaled = values.float() / torch.tensor(scale, dtype=torch.float32)
    expected = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
    got = e4m3.quantize(values, torch.tensor(scale, dtype=torch.float32))
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    assert bool(got.float().isfinite().all())


def test_beyond_the_largest_saturates():
    values = torch.tensor([448.0, 449.0, 464.0, 465.0, 1e30, -1e30, 3.4e38])
    assert e4m3.quantize(values, 1.0).float().tolist() == [448, 448, 448, 448, 448, -448, 448]


def test_output_is_written_in_place():
    values, out = torch.randn(3, 5), torch.full((3, 5), float("nan")).to(torch.float8_e4m3fn)
    assert e4m3.quantize(values, 0.01, out=out) is out
    assert torch.equal(out.view(torch.uint8), e4m3.quantize(values, 0.01).view(torch.uint8))
    assert torch.equal(e4m3.round_trip(values, 0.01), out.float() * 0.01)
