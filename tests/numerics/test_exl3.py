"""EXL3: the format's own values, an independent decoder in plain Python, and the equation in float64."""

import math

import exl3_plain
import pytest
import torch
from exl3_weights import FORMATS, dense, packed
from gemma4q_kernels import exl3
from gemma4q_kernels.exl3 import CODEBOOKS, Exl3Weight, linear, reconstruct, reference, unpack_signs
from tolerances import EXL3_DENSE, EXL3_LINEAR, rms_error

BACKENDS = ["blocks", "reference"]

# float16 bits of the states below, from the description of the format.
STATES = (0, 1, 2, 12345, 65535)
PUBLISHED = {
    "3inst": (0x3A25, 0xBB5B, 0x3B74, 0x3C59, 0xB110),
    "mcg": (0x3F60, 0x304E, 0xBA13, 0xB682, 0x3ACD),
    "mul1": (0xC2E8, 0x3921, 0xB72D, 0xBDA3, 0xB936),
}


def by_equation(weight: Exl3Weight) -> torch.Tensor:
    """diag(suh) H What H diag(svh), float64."""
    block = torch.tensor(exl3_plain.hadamard(), dtype=torch.float64) / math.sqrt(128)
    left = torch.block_diag(*[block] * (weight.in_features // 128))
    right = torch.block_diag(*[block] * (weight.out_features // 128))
    rotated = left @ reference.decode(weight.trellis, weight.codebook).double() @ right
    return weight.suh.double().unsqueeze(1) * rotated * weight.svh.double()


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_the_published_values(codebook: str) -> None:
    got = reference.values(torch.tensor(STATES), codebook).view(torch.int16).tolist()
    assert tuple(bits % 2**16 for bits in got) == PUBLISHED[codebook]
    assert tuple(exl3_plain.value(state, codebook) for state in STATES) == tuple(
        map(exl3_plain.half, PUBLISHED[codebook])
    )


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_every_state_has_the_value_of_plain_arithmetic(codebook: str) -> None:
    got = reference.values(torch.arange(2**16), codebook)
    assert got.dtype == torch.float16
    assert got.tolist() == [exl3_plain.value(state, codebook) for state in range(2**16)]


@pytest.mark.parametrize(("codebook", "width"), FORMATS)
def test_decoding_is_that_of_plain_python(codebook: str, width: int) -> None:
    weight = packed(codebook, width, 8, 8)
    trellis = weight.trellis[:2, :3]  # tiles are independent: six are enough
    assert reference.decode(trellis, codebook).tolist() == exl3_plain.inner(trellis.tolist(), codebook)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("codebook", "width"), [("3inst", 16), ("mcg", 48), ("mul1", 40)])
def test_dense_weights_are_those_of_plain_python(codebook: str, width: int, backend: str) -> None:
    weight = packed(codebook, width, 8, 16)
    weights = exl3_plain.inner(weight.trellis.tolist(), codebook)
    expected = exl3_plain.dense(weights, weight.suh.tolist(), weight.svh.tolist())
    assert dense(weight, torch.float32, backend).tolist() == expected
    assert dense(weight, torch.float16, backend).tolist() == [list(map(exl3_plain.round_half, row)) for row in expected]


@pytest.mark.parametrize("dtype", EXL3_DENSE, ids=str)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_dense_weights_follow_the_equation(codebook: str, dtype: torch.dtype) -> None:
    weight = packed(codebook, 64, 16, 16)
    got, expected = dense(weight, dtype), by_equation(weight)
    assert got.dtype == dtype and rms_error(got, expected) <= EXL3_DENSE[dtype]
    flipped = weight.trellis.clone()
    flipped[3, 5, 17] ^= 0x0100
    other = CODEBOOKS[CODEBOOKS.index(codebook) - 1]
    for broken in (
        Exl3Weight(flipped, weight.suh, weight.svh, codebook),
        Exl3Weight(weight.trellis, weight.svh, weight.suh, codebook),
        Exl3Weight(weight.trellis, weight.suh, weight.svh, other),
        Exl3Weight(weight.trellis, weight.suh, weight.svh * 1.1, codebook),
    ):
        assert rms_error(dense(broken, dtype), expected) > EXL3_DENSE[dtype]


def test_a_slice_of_whole_blocks_is_a_slice_of_the_weight() -> None:
    weight = packed("mcg", 48, 16, 24)
    part = reconstruct(weight.trellis[8:, 8:16], weight.suh[128:], weight.svh[128:256], "mcg")
    assert torch.equal(part, dense(weight)[128:, 128:256])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", EXL3_LINEAR, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 63])
def test_linear_matches_the_equation(rows: int, dtype: torch.dtype, backend: str, poisoned_memory: None) -> None:
    """Shards of one fused linear, each with its own K, codebook and input vector."""
    shards = [
        packed("mcg", 64, 16, 24),
        packed("mcg", 48, 16, 8),
        packed("mul1", 24, 16, 8),
        packed("3inst", 128, 16, 8),
    ]
    x, bias = torch.randn(rows, 256).to(dtype), torch.randn(768)
    expected = x.double() @ torch.cat([by_equation(shard) for shard in shards], dim=1)
    assert rms_error(linear(x, shards, backend=backend), expected) <= EXL3_LINEAR[dtype]
    got = linear(x, shards, bias, backend=backend)
    assert got.dtype == dtype and got.is_contiguous() and rms_error(got, expected + bias) <= EXL3_LINEAR[dtype]
    assert rms_error(linear(x, shards, bias * 1.1, backend=backend), expected + bias) > EXL3_LINEAR[dtype]
    swapped = [shards[0], shards[2], shards[1], shards[3]]
    first = shards[0]
    scaled = [Exl3Weight(first.trellis, first.suh * 1.1, first.svh, first.codebook), *shards[1:]]
    for broken in (swapped, scaled):
        assert rms_error(linear(x, broken, backend=backend), expected) > EXL3_LINEAR[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_keeps_leading_dimensions(backend: str) -> None:
    x, weight = torch.randn(2, 3, 128), packed("mcg", 32, 8, 8)
    got = linear(x, [weight], backend=backend)
    assert torch.equal(got, linear(x.reshape(-1, 128), [weight], backend=backend).view(2, 3, 128))
    assert linear(x[:, :0], [weight], backend=backend).shape == (2, 0, 128)
    x[1, 2, 3] = float("nan")
    assert linear(x, [weight], backend=backend).isnan().any(dim=2).flatten().tolist() == [False] * 5 + [True]


def test_packed_signs_of_old_files() -> None:
    words = torch.randint(-(2**15), 2**15, (16,), dtype=torch.int16)
    assert unpack_signs(words).tolist() == exl3_plain.signs(words.tolist(), 256)
    assert unpack_signs(torch.tensor([1, -(2**15)], dtype=torch.int16)).tolist() == [-1.0] + [1.0] * 30 + [-1.0]
    trellis = packed("3inst", 48, 16, 8).trellis
    old = reconstruct(trellis, words, words[:8], "3inst")
    assert torch.equal(old, reconstruct(trellis, unpack_signs(words), unpack_signs(words[:8]), "3inst"))
    assert not torch.equal(old, reconstruct(trellis, words.flip(0), words[:8], "3inst"))


def test_the_codebook_is_named_by_its_marker() -> None:
    assert exl3.codebook_of(["trellis", "suh", "svh"]) == "3inst"
    assert exl3.codebook_of({"trellis", "suh", "svh", "bias", "mcg"}) == "mcg"
    assert exl3.codebook_of(["mul1", "trellis"]) == "mul1"
    with pytest.raises(ValueError, match=r"got markers \['mcg', 'mul1'\]"):
        exl3.codebook_of(["mul1", "mcg"])


def test_a_weight_knows_its_sizes() -> None:
    weight = packed("mul1", 40, 8, 16)
    assert (weight.in_features, weight.out_features, weight.bits) == (128, 256, 2.5)


TRELLIS, ONES = torch.zeros((8, 8, 64), dtype=torch.int16), torch.ones(128, dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TRELLIS.int(), ONES, ONES, "mcg"), "trellis: got torch.int32 (8, 8, 64), expected torch.int16 [in/16"),
        ((TRELLIS[0], ONES, ONES, "mcg"), "trellis: got torch.int16 (8, 64)"),
        ((TRELLIS[:, :4], ONES, ONES, "mcg"), "trellis: got 8 x 4 tiles, expected multiples of 8 (128 features)"),
        ((TRELLIS[:0], ONES, ONES, "mcg"), "trellis: got 0 x 8 tiles"),
        ((TRELLIS[..., :60], ONES, ONES, "mcg"), "trellis: got 60 int16 a tile, expected one of [16, 32, 48"),
        (
            (TRELLIS[..., :40], ONES, ONES, "mcg"),
            "expected one of [16, 32, 48, 64, 80, 96, 112, 128] with codebook 'mcg'",
        ),
        ((TRELLIS, ONES[:64], ONES, "mcg"), "suh: got torch.float16 (64,) on cpu, expected torch.float16 [128]"),
        ((TRELLIS, ONES, ONES.float(), "mcg"), "svh: got torch.float32 (128,)"),
        ((TRELLIS, ONES, torch.zeros(128, dtype=torch.int16), "mcg"), "or packed signs torch.int16 [8], on cpu"),
        ((TRELLIS, ONES, ONES.to("meta"), "mcg"), "svh: got torch.float16 (128,) on meta"),
        ((TRELLIS, ONES, ONES, "MCG"), "codebook: got 'MCG', expected one of ('3inst', 'mcg', 'mul1')"),
    ],
)
def test_what_does_not_fit_is_named(
    arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor, str], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        reconstruct(*arguments)
    assert message in str(error.value)


def test_linears_that_do_not_fit_are_named() -> None:
    weight, x = Exl3Weight(TRELLIS, ONES, ONES, "mcg"), torch.ones(2, 128)
    with pytest.raises(ValueError, match="shards: got none"):
        linear(x, [])
    with pytest.raises(ValueError, match=r"shards\[1\]: got 256 inputs on cpu, expected 128 on cpu"):
        linear(x, [weight, packed("mcg", 64, 16, 8)])
    with pytest.raises(ValueError, match=r"x: got torch.float32 \(2, 127\)"):
        linear(x[:, 1:], [weight])
    with pytest.raises(ValueError, match="x: got torch.float64"):
        linear(x.double(), [weight])
    with pytest.raises(ValueError, match=r"bias: got torch.float32 \(64,\) on cpu, expected float \[128\]"):
        linear(x, [weight], torch.ones(64))


def test_backends_are_chosen_or_refused() -> None:
    assert exl3.choose("cpu", 1, 128, 128, torch.bfloat16).name == "blocks"
    with pytest.raises(ValueError, match="backend: got 'marlin'"):
        reconstruct(TRELLIS, ONES, ONES, "mcg", backend="marlin")
    with pytest.raises(ValueError, match="dtype: got torch.float64"):
        reconstruct(TRELLIS, ONES, ONES, "mcg", dtype=torch.float64)
