"""FP8 with static scales: rounding by the definition of E4M3, multiplication and experts against float64."""

import pytest
import torch
from gemma4q_kernels import fp8_scaled_mm
from gemma4q_kernels.fp8_scaled_mm import E4M3, cpu, linear, moe_fp8, quantize_static, reference, scaled_mm
from gemma4q_kernels.fp8_scaled_mm.quantize import decode
from gemma4q_kernels.grouped_mm import routing
from tolerances import FP8_MOE, FP8_SCALED_MM, rms_error

SHAPES = [(1, 63, 176), (5, 1, 7), (63, 65, 352), (17, 130, 704)]
BACKENDS = ["blocks", "reference"]


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random E4M3 codes of every magnitude, NaN excepted."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.where(bits & 0x7F == 0x7F, 0, bits).view(E4M3)


def all_values() -> list[float]:
    """The finite numbers of E4M3, from its definition: bias 7, three bits of fraction, subnormals below 2**-6."""
    magnitudes = [mantissa * 2.0**-9 for mantissa in range(8)]
    magnitudes += [(8 + mantissa) * 2.0 ** (exponent - 10) for exponent in range(1, 16) for mantissa in range(8)]
    return sorted({sign * value for value in magnitudes[:-1] for sign in (-1, 1)})


def test_decoding_is_the_definition() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(E4M3)
    decoded = decode(every)
    assert torch.equal(decoded.nan_to_num(9.0), every.float().nan_to_num(9.0))
    assert sorted(set(decoded[decoded.isfinite()].tolist())) == all_values()
    strided = codes(6, 10)[:, ::2]
    assert torch.equal(decode(strided, torch.empty(6, 5)), strided.float())


def test_rounding_is_to_the_nearest_code() -> None:
    values = torch.tensor(all_values(), dtype=torch.float64)
    x = torch.cat([torch.randn(4000) * 100, torch.randn(1000) * 0.01, torch.tensor([0.0, 448, 449, 1e30, -1e30])])
    got = quantize_static(x, torch.tensor(1.0)).double()
    nearest = (x.double().clamp(-448, 448).unsqueeze(1) - values).abs().amin(dim=1)
    assert torch.equal((x.double().clamp(-448, 448) - got).abs(), nearest)


def test_ties_go_to_even_and_saturation_to_the_largest() -> None:
    x = torch.tensor([1.0625, 1.1875, -1.0625, 2.0**-10, 3 * 2.0**-10, 1000.0, float("-inf")])
    assert quantize_static(x, torch.tensor([1.0])).float().tolist() == [1.0, 1.25, -1.0, 0.0, 2.0**-8, 448.0, -448.0]
    assert quantize_static(torch.tensor([float("nan")]), torch.tensor([1.0])).float().isnan().all()


def test_the_scale_divides() -> None:
    x = torch.tensor([0.5, -1.75])
    assert quantize_static(x, torch.tensor(0.25)).float().tolist() == [2.0, -7.0]


@pytest.mark.parametrize("dtype", FP8_SCALED_MM, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_match_the_oracle(
    shape: tuple[int, int, int], dtype: torch.dtype, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_SCRATCH_ELEMENTS", 16 * shape[2])  # several blocks, the last one short
    m, n, k = shape
    x_q, w_q, x_scale, w_scale, bias = codes(m, k), codes(n, k, seed=1), torch.tensor(2e-3), torch.rand(n) + 0.1, None
    for bias in (None, torch.randn(n)):
        expected = reference.scaled_mm(x_q, x_scale, w_q, w_scale, bias, torch.float64)
        got = scaled_mm(x_q, x_scale, w_q, w_scale, bias=bias, out_dtype=dtype)
        assert got.dtype == dtype and got.is_contiguous() and rms_error(got, expected) <= FP8_SCALED_MM[dtype]
        assert rms_error(scaled_mm(x_q, x_scale * 1.1, w_q, w_scale, out_dtype=dtype), expected) > FP8_SCALED_MM[dtype]


def test_each_row_has_its_own_scale() -> None:
    x_q, w_q = torch.ones(1, 4).to(E4M3), torch.ones(3, 4).to(E4M3)
    for scale in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0], [2.0], [3.0]])):
        assert scaled_mm(x_q, torch.tensor(0.5), w_q, scale, out_dtype=torch.float32).tolist() == [[2.0, 4.0, 6.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_keeps_shape_and_dtype(backend: str) -> None:
    x, w_q = torch.randn(2, 3, 16, dtype=torch.bfloat16), codes(5, 16)
    got = linear(x, w_q, torch.rand(5), torch.tensor(0.01), backend=backend)
    assert got.shape == (2, 3, 5) and got.dtype == torch.bfloat16
    assert linear(x[:0], w_q, torch.rand(5), torch.tensor(0.01)).shape == (0, 3, 5)


def test_a_nan_in_the_input_is_not_hidden() -> None:
    x = torch.zeros(2, 16)
    x[1, 3] = float("nan")
    assert linear(x, codes(4, 16), torch.ones(4), torch.tensor(1.0)).isnan().any(dim=1).tolist() == [False, True]


X, W, SCALES, ONE = codes(2, 8), codes(4, 8), torch.ones(4), torch.tensor(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.float(), ONE, W, SCALES), "x_q: got torch.float32"),
        ((X, ONE, W.float(), SCALES), "w_q: got torch.float32"),
        ((X, ONE, W, torch.ones(3)), "weight_scale: got torch.float32 (3,)"),
        ((X, ONE, W, SCALES.double()), "weight_scale: got torch.float64"),
        ((X, torch.ones(2), W, SCALES), "input_scale: got torch.float32 (2,)"),
        ((codes(2, 7), ONE, W, SCALES), "expected torch.float8_e4m3fn [M, 8]"),
    ],
)
def test_what_does_not_fit_is_named(arguments: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:
        scaled_mm(*arguments)
    assert message in str(error.value)


def test_backends_are_chosen_or_refused() -> None:
    assert fp8_scaled_mm.choose("cpu", 1, 4, 8, torch.float32).name == "blocks"
    with pytest.raises(ValueError, match="triton launches on GPUs"):
        fp8_scaled_mm.choose("cpu", 1, 4, 8, torch.float32, "triton")
    with pytest.raises(ValueError, match="backend: got 'cutlass'"):
        fp8_scaled_mm.choose("cpu", 1, 4, 8, torch.float32, "cutlass")


HIDDEN, INNER, TOP_K = 48, 24, 3


def layer(count: int) -> tuple[torch.Tensor, ...]:
    """Stacked weights as a checkpoint would hold them, scales apart by row, and two input scales that fit."""
    generator = torch.Generator().manual_seed(count)
    stack = []
    for shape in ((count, 2 * INNER, HIDDEN), (count, HIDDEN, INNER)):
        weight = torch.randn(shape, generator=generator) * 0.1
        scale = weight.abs().amax(dim=2) / 448
        stack += [(weight / scale.unsqueeze(2)).to(E4M3), scale]
    return *stack, torch.tensor(0.01), torch.tensor([0.008])


def routed(tokens: int, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    weights, ids = torch.randn(tokens, count, generator=generator).softmax(dim=1).topk(TOP_K)
    return hidden, weights, ids.int()


@pytest.mark.parametrize("dtype", FP8_MOE, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 63])
def test_experts_match_the_oracle(tokens: int, dtype: torch.dtype, poisoned_memory: None) -> None:
    tensors, (hidden, weights, ids) = layer(8), routed(tokens, 8, dtype)
    expected = reference.moe_fp8(hidden, *tensors, weights, ids)
    got = moe_fp8(hidden, *tensors, weights, ids)
    assert got.dtype == dtype and got.shape == hidden.shape
    assert rms_error(got, expected) <= FP8_MOE[dtype]
    for broken in (1, 3, 4, 5):
        scaled = tuple(tensor * 1.1 if index == broken else tensor for index, tensor in enumerate(tensors))
        assert rms_error(moe_fp8(hidden, *scaled, weights, ids), expected) > FP8_MOE[dtype]


def test_experts_of_other_ranks_contribute_nothing() -> None:
    tensors, (hidden, weights, ids) = layer(4), routed(9, 4, torch.float32)
    whole = moe_fp8(hidden, *tensors, weights, ids)
    halves = []
    for rank in range(2):
        local = tuple(t[2 * rank : 2 * rank + 2] if t.dim() > 1 else t for t in tensors)
        ours = torch.tensor([0, 1, -1, -1] if rank == 0 else [-1, -1, 0, 1])
        halves.append(moe_fp8(hidden, *local, weights, ids, expert_map=ours))
    assert rms_error(sum(halves[1:], halves[0]), whole) <= FP8_MOE[torch.float32]
    assert rms_error(halves[0], whole) > FP8_MOE[torch.float32]


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "is_capturing", lambda tensor: True)


OF_TWO_RANKS = torch.tensor([2, -1, 0, 3, 1, -1])


@pytest.mark.parametrize("expert_map", [None, OF_TWO_RANKS], ids=["alone", "over-ranks"])
def test_experts_in_a_graph_compute_the_same(expert_map: torch.Tensor | None, request: pytest.FixtureRequest) -> None:
    tensors, (hidden, weights, ids) = layer(4), routed(9, 4 if expert_map is None else 6, torch.float32)
    ids[0, 1] = -1
    expected = moe_fp8(hidden, *tensors, weights, ids, expert_map=expert_map)
    request.getfixturevalue("capturing")
    assert rms_error(moe_fp8(hidden, *tensors, weights, ids, expert_map=expert_map), expected) <= FP8_MOE[torch.float32]
    wrong = moe_fp8(hidden, *tensors, weights * 1.1, ids, expert_map=expert_map)
    assert rms_error(wrong, expected) > FP8_MOE[torch.float32]


def _without_values(expert_map: torch.Tensor | None) -> torch.Tensor:
    """Experts on torch's meta device, where whatever asks for a value fails."""
    tensors, batch = ([tensor.to("meta") for tensor in some] for some in (layer(4), routed(9, 4, torch.bfloat16)))
    hidden, *routing_of = batch
    return moe_fp8(hidden, *tensors, *routing_of, expert_map=None if expert_map is None else expert_map.to("meta"))


@pytest.mark.parametrize("expert_map", [None, OF_TWO_RANKS], ids=["alone", "over-ranks"])
@pytest.mark.usefixtures("capturing")
def test_experts_in_a_graph_do_not_wait_for_the_device(expert_map: torch.Tensor | None) -> None:
    assert _without_values(expert_map).shape == (9, HIDDEN)


def test_what_overflows_of_tokens_that_chose_another_is_not_added() -> None:
    """In a graph every expert computes every token: in float16 that may overflow where it was never meant to be."""
    ids, weights = torch.tensor([[0], [1]]), torch.ones(2, 1)
    out = torch.zeros(2, 3)
    for share in routing.all_shares(weights, ids, 2, None):
        computed = torch.full((2, 3), torch.inf)
        computed[share.expert] = 2.0
        share.add(out, computed)
    assert torch.equal(out, torch.full((2, 3), 2.0))


def test_experts_outside_of_a_graph_ask_for_the_routing() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        _without_values(None)


def test_experts_that_do_not_fit_are_named() -> None:
    tensors, (hidden, weights, ids) = layer(4), routed(2, 4, torch.float32)
    with pytest.raises(ValueError, match="w13_scale: got"):
        moe_fp8(hidden, tensors[0], tensors[1][:, :1], *tensors[2:], weights, ids)
    with pytest.raises(ValueError, match="experts: got torch.float32"):
        moe_fp8(hidden, tensors[0].float(), *tensors[1:], weights, ids)
