"""Parts of packed linears over ranks: together they are the whole, wherever blocks of 128 begin."""

import math

import pytest
import torch
from gemma4q_kernels.exl3 import Exl3Weight, linear
from gemma4q_kernels.exl3.slicing import cut
from gemma4q_kernels.exl3_layout import Span
from gemma4q_kernels.grouped_mm.routing import active_shares, all_shares
from numerics.exl3_weights import dense, packed
from tolerances import EXL3_LINEAR, rms_error

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.exl3.experts import Expert, Experts
from vllm_gemma4q.exl3.facts import Packed
from vllm_gemma4q.exl3.shards import Layout, Part, decode, expert_share, share

LEAVES = ("trellis", "suh", "svh")
BOUND = EXL3_LINEAR[torch.float32]
# The features of 26B-A4B's dense MLP, its experts, 31B's MLP scaled down, and one that pads more than a rank holds.
SIZES = (2112, 704, 1024, 192)


def _part(weight: Exl3Weight, inputs: Span, outputs: Span) -> Exl3Weight:
    return Exl3Weight(*(cut(leaf, getattr(weight, leaf), inputs, outputs) for leaf in LEAVES), weight.codebook)


def _whole(in_features: int, out_features: int) -> Exl3Weight:
    return packed("mcg", 32, *(math.ceil(size / 128) * 8 for size in (in_features, out_features)))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_parts_of_the_output_lie_behind_each_other(size: int, ranks: int) -> None:
    weight, x = _whole(128, size), torch.randn(3, 128)
    found = []
    for rank in range(ranks):
        span = share(size, size // ranks, rank, ranks)
        found.append(span.extract(linear(x, [_part(weight, Span(0, 128), span)])))
    assert rms_error(torch.cat(found, dim=1), linear(x, [weight])[:, :size]) <= BOUND


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_parts_of_the_input_add_up(size: int, ranks: int) -> None:
    weight, x = _whole(size, 128), torch.randn(3, size)
    expected = x @ dense(weight, torch.float32)[:size]
    local, found, misplaced = size // ranks, torch.zeros(3, 128), torch.zeros(3, 128)
    for rank in range(ranks):
        span = share(size, local, rank, ranks)
        part = _part(weight, span, Span(0, 128))
        rows = x[:, rank * local : (rank + 1) * local]
        found += linear(span.embed(rows), [part])
        misplaced += linear(Span(0, local).embed(rows), [_part(weight, span._replace(start=span.first), Span(0, 128))])
    assert rms_error(found, expected) <= BOUND
    aligned = local % 128 == 0
    assert aligned or ranks == 1 or rms_error(misplaced, expected) > 1000 * BOUND


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("size", [21504, 32 * 256, 16 * 256, 32 * 512])
def test_aligned_parts_hold_nothing_twice(size: int, ranks: int) -> None:
    """31B: all that ranks divide."""
    spans = [share(size, size // ranks, rank, ranks) for rank in range(ranks)]
    assert [span.first for span in spans] == [rank * size // ranks for rank in range(ranks)]
    assert sum(span.covered for span in spans) == size


@pytest.mark.parametrize(("size", "blocks"), [(2112, [9, 9]), (704, [3, 4])])
def test_a_block_at_a_boundary_is_held_by_both(size: int, blocks: list[int]) -> None:
    """26B-A4B over two ranks: 17 and 6 blocks in the file."""
    assert [share(size, size // 2, rank, 2).covered // 128 for rank in range(2)] == blocks


def test_keys_that_two_ranks_share() -> None:
    assert [share(1024, 512, rank, 4) for rank in range(4)] == [
        Span(0, 512),
        Span(0, 512),
        Span(512, 512),
        Span(512, 512),
    ]


def test_ranks_that_do_not_divide_experts_are_refused() -> None:
    assert expert_share("layers.0.experts", 704, 176, 3, 4) == Span(528, 176)
    with pytest.raises(
        InputError, match=r"^layers\.0\.experts: got experts of 704 .* over 6 ranks, .* at most 4, or --en"
    ):
        expert_share("layers.0.experts", 704, 117, 0, 6)


def test_spans_beyond_a_tensor_are_refused() -> None:
    weight = _whole(128, 128)
    with pytest.raises(ValueError, match="trellis: got 128 features, expected 256 or more"):
        cut("trellis", weight.trellis, Span(0, 128), Span(0, 129))
    with pytest.raises(ValueError, match="name: got 'mcg'"):
        cut("mcg", weight.suh, Span(0, 128), Span(0, 128))


@pytest.mark.engine
def test_flat_parameters_hold_every_part_as_the_file_has_it() -> None:
    weights = [packed("mcg", 32), packed("mul1", 56, 8, 16), packed("3inst", 128)]
    inputs = Span(0, 128)
    layout = Layout(
        tuple(
            Part(Packed(128, one.out_features, one.trellis.shape[2], one.codebook), inputs, Span(0, one.out_features))
            for one in weights
        )
    )
    assert decode(tuple(layout.encode())) == layout
    layer, loaded = torch.nn.Module(), []
    layout.register(layer, "w13_", lambda leaf, parameter, tensor, index: loaded.append((leaf, index)))
    layer.w13_trellis.weight_loader(layer.w13_trellis, None, 2)
    assert loaded == [("trellis", 2)]
    assert [layer.get_parameter(f"w13_{leaf}").dtype for leaf in LEAVES] == [torch.int16, torch.float16, torch.float16]
    for index, weight in enumerate(weights):
        for leaf in LEAVES:
            layout.load(leaf, layer.get_parameter(f"w13_{leaf}"), getattr(weight, leaf), index)
    got = layout.weights(*(layer.get_parameter(f"w13_{leaf}") for leaf in LEAVES))
    for one, other in zip(weights, got, strict=True):
        assert all(torch.equal(getattr(one, leaf), getattr(other, leaf)) for leaf in LEAVES)
        assert one.codebook == other.codebook
    held = sum(parameter.nbytes for parameter in layer.parameters())
    assert held == sum(getattr(one, leaf).nbytes for one in weights for leaf in LEAVES)


@pytest.mark.engine
@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1]], ids=["shards", "values-are-keys"])
def test_the_operation_is_what_torch_compile_takes_it_for(order: list[int]) -> None:
    """A fused linear cut at both ends of both sides, its last shard given twice."""
    from vllm_gemma4q.exl3.linear import exl3_linear

    weights = [packed("mcg", 32, 16, 16), packed("mul1", 56, 16, 8)]
    inputs, outputs = Span(64, 100), (Span(96, 100), Span(0, 40))
    parts = tuple(
        Part(Packed(256, one.out_features, one.trellis.shape[2], one.codebook), inputs, span)
        for one, span in zip(weights, outputs, strict=True)
    )
    cuts = [[cut(leaf, getattr(one, leaf), inputs, span).flatten() for leaf in LEAVES]
            for one, span in zip(weights, outputs, strict=True)]  # fmt: skip
    flat = [torch.cat(tensors) for tensors in zip(*cuts, strict=True)]
    x = torch.randn(5, 100)
    arguments = (x, *flat, Layout(parts).encode(), order)
    torch.library.opcheck(exl3_linear, arguments)
    expected = [x @ dense(one, torch.float32)[64:164, span.start : span.start + span.size]
                for one, span in zip(weights, outputs, strict=True)]  # fmt: skip
    assert rms_error(exl3_linear(*arguments), torch.cat([expected[index] for index in order], dim=1)) <= BOUND


def _experts() -> Experts:
    widths = ((32, 48, 64), (48, 48, 80), (32, 48, 64), (16, 128, 32))
    return Experts([Expert(*(packed("mcg", width) for width in three)) for three in widths], Span(0, 100), Span(0, 70))


@pytest.mark.parametrize("expert_map", [None, torch.tensor([2, -1, 0, 3, 1, -1])], ids=["alone", "over-ranks"])
def test_experts_are_what_their_dense_weights_say(expert_map: torch.Tensor | None) -> None:
    """Whether they see their own tokens or all of them, as while a CUDA graph is captured."""
    experts, x = _experts(), torch.randn(7, 100)
    ids = torch.stack([torch.randperm(4 if expert_map is None else 6)[:2] for _ in x])
    ids[0, 1] = -1
    weights = torch.rand(7, 2)
    expected = torch.zeros(7, 100)
    matrices = [[dense(one, torch.float32) for one in expert] for expert in experts.experts]
    for token, (row, chosen) in enumerate(zip(x, ids.tolist(), strict=True)):
        for slot, number in enumerate(chosen):
            place = -1 if number < 0 else number if expert_map is None else int(expert_map[number])
            if place >= 0:
                gate, up, down = matrices[place]
                inner = torch.nn.functional.gelu(row @ gate[:100, :70], approximate="tanh") * (row @ up[:100, :70])
                expected[token] += weights[token, slot] * (inner @ down[:70, :100])
    assert rms_error(experts(x, weights, ids, "gelu_tanh", expert_map), expected) <= BOUND
    for shares in (active_shares, all_shares):
        out = experts.total(x, shares(weights, ids, 4, expert_map), "gelu_tanh")
        assert rms_error(out, expected) <= BOUND
        wrong = experts.total(x, shares(weights, ids.flip(0), 4, expert_map), "gelu_tanh")
        assert rms_error(wrong, expected) > 1000 * BOUND


def test_formats_among_experts() -> None:
    experts = _experts()
    assert {expert.gate.trellis.shape[2] for expert in experts.formats()} == {16, 32, 48} and len(
        experts.formats()
    ) == 3
