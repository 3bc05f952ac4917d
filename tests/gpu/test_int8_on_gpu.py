"""Every INT8 kernel on a GPU, against float64: integers to the bit, odd shapes, poisoned outputs, CUDA graphs.

`make test-gpu`, or without an engine `PYTHONPATH=kernels python -m pytest -m gpu tests/gpu` where torch, Triton and
pydantic are. What the interpreter checks on CPU tensors is checked here on the GPU's, beside all that it cannot do:
the tiles of this GPU, bfloat16, real sizes, graphs.

Quantization is compared with the CPU's: there torch divides, where on a GPU it multiplies with a reciprocal.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from gemma4q_kernels import fused_quantize, grouped_mm, int8_scaled_mm
from gemma4q_kernels.grouped_mm import reference as moe_reference
from gemma4q_kernels.grouped_mm.tiles import table as grouped_table
from gemma4q_kernels.grouped_mm.triton import grouped_scaled_mm
from gemma4q_kernels.grouped_mm.triton_routing import route
from gemma4q_kernels.int8_scaled_mm.tiles import table
from gemma4q_kernels.int8_scaled_mm.triton import launch, quantize_per_token
from gemma4q_kernels.support import architecture
from numerics import interpreted_fused, interpreted_grouped, interpreted_int8
from tolerances import INT8_MOE_STORED, INT8_SCALED_MM, rms_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N and K of Gemma 4: 26B-A4B dense and experts over ranks, 31B attention.
WEIGHTS = ((2112, 2816), (2816, 528), (2816, 176), (5376, 2048), (16384, 5376))
BANDS = (1, 16, 17, 65, 257, 1025)


def _codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def _exact(x_q: torch.Tensor, w_q: torch.Tensor) -> torch.Tensor:
    return x_q.double() @ w_q.double().t()


def _captured(run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of one call, and the tensor that each replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize("splits", [1, 3, 64])
@pytest.mark.parametrize(("m", "n", "k"), [(67, 131, 704), (131, 259, 177)])
def test_every_tile_of_the_table(m: int, n: int, k: int, splits: int) -> None:
    x_q, w_q = _codes(m, k), _codes(n, k)
    ones, exact = (torch.ones(m, 1), torch.ones(n)), _exact(x_q, w_q)
    tiles = {row.tile for row in table(architecture(torch.device("cuda")))[0].rows}
    assert tiles
    for tile in tiles:
        got = launch(x_q, ones[0], w_q, ones[1], None, torch.float32, tile, splits)
        assert torch.equal(got.double(), exact), tile
    lost = launch(x_q[:, 1:], ones[0], w_q[:, 1:], ones[1], None, torch.float32, tile, splits)
    assert not torch.equal(lost.double(), exact)


@pytest.mark.parametrize("m", BANDS)
@pytest.mark.parametrize(("n", "k"), WEIGHTS)
def test_chosen_tiles_at_real_sizes(m: int, n: int, k: int) -> None:
    x_q, w_q = _codes(m, k), _codes(n, k)
    x_scale, w_scale, bias = torch.rand(m, 1) + 0.1, torch.rand(n) + 0.1, torch.randn(n)
    multiply = partial(int8_scaled_mm.scaled_mm, backend="triton")
    exact = _exact(x_q, w_q)
    ones = torch.ones(m, 1), torch.ones(n)
    # One rounding, of sums beyond 2**24.
    assert torch.equal(multiply(x_q, ones[0], w_q, ones[1], out_dtype=torch.float32), exact.float())
    expected = exact * x_scale.double() * w_scale.double() + bias.double()
    for dtype in DTYPES[:2]:
        got = multiply(x_q, x_scale, w_q, w_scale, bias=bias, out_dtype=dtype)
        assert torch.equal(got, multiply(x_q, x_scale, w_q, w_scale, bias=bias, out_dtype=dtype))
        assert rms_error(got, expected) <= INT8_SCALED_MM[dtype]
        wrong = multiply(x_q, x_scale * 1.1, w_q, w_scale, bias=bias, out_dtype=dtype)
        assert rms_error(wrong, expected) > INT8_SCALED_MM[dtype]


@pytest.mark.parametrize(("m", "n", "k"), interpreted_int8.SHAPES)
def test_scaled_mm_at_odd_shapes(m: int, n: int, k: int) -> None:
    interpreted_int8.check_scaled_mm(m, n, k)


@pytest.mark.parametrize(("m", "n", "k", "splits"), interpreted_int8.SPLITS)
def test_uneven_splits(m: int, n: int, k: int, splits: int) -> None:
    interpreted_int8.check_split(m, n, k, splits)


def test_non_finite_tokens_show() -> None:
    interpreted_int8.check_non_finite_tokens()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (5, 704), (3, 2500), (1025, 5376), (2, 21504)])
def test_quantization_to_the_bit(m: int, k: int, dtype: torch.dtype) -> None:
    x = (torch.randn(m, k) * torch.logspace(-3, 3, m).unsqueeze(1)).to(dtype)
    x[-1] = 0
    for values in (x, x.t().contiguous().t()):
        for got, expected in zip(quantize_per_token(values), int8_scaled_mm.quantize_per_token(x.cpu()), strict=True):
            assert torch.equal(got.cpu(), expected)
    ties = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]])
    assert quantize_per_token(ties)[0].tolist() == [[127, 0, 2, 2, 0, -2, -127]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 16, 300])
def test_linear_in_a_graph(m: int, dtype: torch.dtype) -> None:
    """Replays see new tokens, agree with calls outside a graph to the bit, and with the definition."""
    n, k = 2112, 2816
    w_q, w_scale = int8_scaled_mm.quantize_per_channel(torch.randn(n, k))
    x, bias = torch.empty(m, k, dtype=dtype), torch.randn(n, dtype=dtype)
    run = partial(int8_scaled_mm.linear, x, w_q, w_scale, bias, "triton")
    x.normal_()
    graph, out = _captured(run)
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert out.dtype == dtype and torch.equal(out, run())
        rows, scale, added = (tensor.cpu().float() for tensor in (x, w_scale, bias))
        expected = int8_scaled_mm.linear(rows, w_q.cpu(), scale, added, backend="reference")
        assert rms_error(out.cpu(), expected) <= INT8_SCALED_MM[dtype]
        wrong = int8_scaled_mm.linear(rows, w_q.cpu(), scale * 1.1, added, backend="reference")
        assert rms_error(out.cpu(), wrong) > INT8_SCALED_MM[dtype]


@pytest.mark.parametrize(
    "check",
    [check for group in interpreted_grouped.CHECKS.values() for _, check in group],
    ids=[name for group in interpreted_grouped.CHECKS.values() for name, _ in group],
)
def test_experts(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(("n", "k"), [(131, 704), (130, 177)])
def test_every_grouped_tile(n: int, k: int) -> None:
    tokens, experts, top_k = 150, 3, 2
    x_q, w_q = _codes(tokens, k), _codes(experts, n, k)
    ids = torch.rand(tokens, experts).topk(top_k).indices.int()
    ids[0, 0] = -1
    exact = torch.stack([_exact(x_q, w) for w in w_q])[ids.long().flatten(), torch.arange(tokens * top_k) // top_k]
    tiles = {row.tile for row in grouped_table(architecture(torch.device("cuda"))).rows}
    assert tiles
    for tile in tiles:
        out = torch.full((tokens * top_k, n), float("nan"))
        blocks = route(ids, experts, None, tile.block_m)
        grouped_scaled_mm(x_q, torch.ones(tokens, 1), w_q, torch.ones(experts, n), blocks, out, tile)
        assert out[0].isnan().all() and torch.equal(out[1:].double(), exact[1:]), tile


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(("experts", "intermediate"), [(98, 176), (98, 352), (128, 704)])
def test_experts_in_a_graph(tokens: int, experts: int, intermediate: int) -> None:
    """Each replay is routed anew, some experts getting nothing, and agrees with calls outside to the bit."""
    hidden, top_k = 2816, 8
    w13, w13_scale, w2, w2_scale = interpreted_grouped.layer_of(experts, hidden, intermediate)
    x = torch.randn(tokens, hidden).bfloat16()
    weights, ids = interpreted_grouped.routing_of(tokens, experts, top_k, "all")
    run = partial(grouped_mm.moe_int8, x, w13, w13_scale, w2, w2_scale, weights, ids, backend="triton")
    graph, out = _captured(run)
    for kind in ("all", "few", "same"):
        x.copy_(torch.randn(tokens, hidden))
        for old, new in zip((weights, ids), interpreted_grouped.routing_of(tokens, experts, top_k, kind), strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(out, run())
        expected = moe_reference.moe_int8(x, w13, w13_scale, w2, w2_scale, weights, ids)
        assert rms_error(out, expected) <= INT8_MOE_STORED
        wrong = grouped_mm.moe_int8(x, w13, w13_scale, w2, w2_scale * 1.1, weights, ids, backend="triton")
        assert rms_error(wrong, expected) > INT8_MOE_STORED


@pytest.mark.parametrize("rounding", fused_quantize.ROUNDINGS)
@pytest.mark.parametrize("dtype", interpreted_fused.DTYPES)
def test_fused_steps(dtype: torch.dtype, rounding: str) -> None:
    for rows, width in interpreted_fused.NORM_SHAPES:
        interpreted_fused.check_norm(rows, width, dtype, rounding)
    for rows, width in interpreted_fused.GATED_SHAPES:
        interpreted_fused.check_gated(rows, width, dtype, rounding)


def test_fused_steps_with_other_rows() -> None:
    interpreted_fused.check_roundings_differ()
    interpreted_fused.check_non_finite_rows()


@pytest.mark.parametrize("tokens", [1, 257])
def test_fused_steps_in_bfloat16_in_a_graph(tokens: int) -> None:
    """At real sizes: 26B-A4B's norm and 31B's gate, against the CPU's."""
    x, residual = (torch.randn(tokens, 2816).bfloat16() for _ in range(2))
    weight, gate_up = (torch.rand(2816) + 0.5).bfloat16(), torch.randn(tokens, 2 * 21504).bfloat16()
    norm = partial(fused_quantize.rms_norm_quantize, rounding="twice")
    gate = partial(fused_quantize.gated_quantize, rounding="once")
    results: list[tuple[torch.Tensor, ...]] = []

    def run() -> torch.Tensor:
        results.append((*norm(x, weight, residual, backend="triton"), *gate(gate_up, backend="triton")))
        return results[-1][0]

    graph, _ = _captured(run)
    for tensor in (x, residual, gate_up):
        tensor.copy_(torch.randn(tensor.shape))
    graph.replay()
    q, scale, total, gated_q, gated_scale = (tensor.cpu() for tensor in results[-1])
    assert total.equal((x + residual).cpu())
    expected = norm(x.cpu(), weight.cpu(), residual.cpu(), backend="reference")
    assert interpreted_fused.agrees((q, scale), expected[:2])
    assert not interpreted_fused.agrees((q, scale * 1.1), expected[:2])
    expected = gate(gate_up.cpu(), backend="reference")
    assert interpreted_fused.agrees((gated_q, gated_scale), expected)
    assert not interpreted_fused.agrees((gated_q, gated_scale * 1.1), expected)
