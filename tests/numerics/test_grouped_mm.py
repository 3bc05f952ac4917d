"""INT8 experts on the CPU against a float64 loop over tokens and experts."""

import pytest
import torch
from gemma4q_kernels import grouped_mm
from gemma4q_kernels.grouped_mm import reference
from gemma4q_kernels.grouped_mm.routing import group_by_expert
from gemma4q_kernels.int8_scaled_mm import quantize_per_channel
from gemma4q_kernels.int8_scaled_mm.cpu import OneDnnWeight
from gemma4q_kernels.int8_scaled_mm.problem import Problem
from tolerances import INT8_MOE, rms_error

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
HIDDEN, INTERMEDIATE, TOP_K = 176, 88, 3


def experts(count: int, seed: int = 0) -> Tensors:
    """Stacked gate-up and down weights, quantized as a checkpoint would hold them."""
    generator = torch.Generator().manual_seed(seed)
    w13 = torch.randn(count, 2 * INTERMEDIATE, HIDDEN, generator=generator) * 0.1
    w2 = torch.randn(count, HIDDEN, INTERMEDIATE, generator=generator) * 0.1
    quantized = [[quantize_per_channel(matrix) for matrix in stack] for stack in (w13, w2)]
    (w13_q, w13_scale), (w2_q, w2_scale) = (map(torch.stack, zip(*stack, strict=True)) for stack in quantized)
    return w13_q, w13_scale, w2_q, w2_scale


def routed(tokens: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Hidden states, weights and ids of a batch; the last quarter of the experts is never chosen."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    logits = torch.randn(tokens, count, generator=generator)
    logits[:, count - count // 4 :] = -1e9
    weights, ids = logits.softmax(dim=1).topk(TOP_K)
    return hidden, weights, ids.int()


ANY = Problem(torch.device("cpu"), 1, 64, 64, torch.float32)


def run(form: str, hidden: torch.Tensor, layer: Tensors, *routing: object) -> torch.Tensor:
    """One layer of experts in one of the three forms that a caller may use."""
    if form == "tensors":
        return grouped_mm.moe_int8(hidden, *layer, *routing)  # type: ignore[arg-type]
    if form == "onednn" and "saturates" in OneDnnWeight.can_implement(ANY).reason:
        pytest.skip("x86 without VNNI, where nothing uses vLLM's oneDNN")
    return grouped_mm.Experts(*layer, backend=form)(hidden, *routing)  # type: ignore[arg-type]


FORMS = ["tensors", "plain", pytest.param("onednn", marks=pytest.mark.engine)]


@pytest.mark.parametrize("dtype", INT8_MOE, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 63])
@pytest.mark.parametrize("form", FORMS)
def test_matches_the_oracle(form: str, tokens: int, dtype: torch.dtype, poisoned_memory: None) -> None:
    layer = experts(8)
    hidden, weights, ids = routed(tokens, 8, dtype)
    expected = reference.moe_int8(hidden, *layer, weights, ids)
    got = run(form, hidden, layer, weights, ids)
    assert got.dtype == dtype and got.shape == hidden.shape
    assert rms_error(got, expected) <= INT8_MOE[dtype]
    for broken in (1, 3):
        scaled = tuple(tensor * 1.1 if index == broken else tensor for index, tensor in enumerate(layer))
        assert rms_error(run(form, hidden, scaled, weights, ids), expected) > INT8_MOE[dtype]  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", grouped_mm.ACTIVATIONS)
def test_activations(activation: str) -> None:
    layer = experts(4)
    hidden, weights, ids = routed(7, 4)
    results = {name: grouped_mm.moe_int8(hidden, *layer, weights, ids, name) for name in grouped_mm.ACTIVATIONS}
    expected = reference.moe_int8(hidden, *layer, weights, ids, activation)
    for name, got in results.items():
        assert (rms_error(got, expected) <= INT8_MOE[torch.float32]) == (name == activation)


def test_oracle_is_the_definition() -> None:
    """One token, one expert, codes that are exact: gate and up are told apart, and the scales land on their rows."""
    w13_q = torch.tensor([[[1, 0], [0, 1]]], dtype=torch.int8)  # gate = x[0], up = x[1]
    w2_q = torch.tensor([[[127], [-64]]], dtype=torch.int8)
    hidden = torch.tensor([[127.0, 2.0]])
    one, weight = torch.tensor([[0]]), torch.tensor([[0.5]])
    got = reference.moe_int8(hidden, w13_q, torch.tensor([[2.0, 3.0]]), w2_q, torch.tensor([[1.0, 10.0]]), weight, one)
    # silu or gelu of 254 is 254; 254 * 6 = 1524 is its own largest code, so quantization keeps it.
    assert got.tolist()[0] == pytest.approx([0.5 * 127 * 1524, 0.5 * -640 * 1524], rel=1e-6)


def test_an_unused_slot_is_no_expert_of_a_rank() -> None:
    """-1 is not the last entry of the map."""
    layer = experts(2)
    hidden, weights, ids = routed(5, 6)
    expert_map = torch.tensor([-1, -1, -1, 0, -1, 1])
    unused = torch.where(torch.arange(TOP_K) == 1, -1, ids)
    for run_layer in (reference.moe_int8, grouped_mm.moe_int8):
        got = run_layer(hidden, *layer, weights, unused, "gelu_tanh", expert_map)
        without = run_layer(hidden, *layer, weights[:, ::2], ids[:, ::2], "gelu_tanh", expert_map)
        assert torch.equal(got, without) and got.any()


@pytest.mark.parametrize("form", FORMS)
def test_ranks_of_expert_parallelism_add_up(form: str) -> None:
    layer = experts(6)
    hidden, weights, ids = routed(9, 6)
    whole = reference.moe_int8(hidden, *layer, weights, ids)
    parts = []
    for local in ([0, 2, 4], [1, 3, 5]):
        expert_map = torch.full((6,), -1, dtype=torch.int32)
        expert_map[local] = torch.arange(3, dtype=torch.int32)
        shard = tuple(tensor[local] for tensor in layer)
        part = run(form, hidden, shard, weights, ids, "gelu_tanh", expert_map)  # type: ignore[arg-type]
        assert (
            rms_error(part, reference.moe_int8(hidden, *shard, weights, ids, "gelu_tanh", expert_map))
            <= INT8_MOE[torch.float32]
        )
        parts.append(part)
    assert rms_error(parts[0], whole) > INT8_MOE[torch.float32]
    assert rms_error(parts[0] + parts[1], whole) <= INT8_MOE[torch.float32]


def test_nothing_to_do_is_zero(poisoned_memory: None) -> None:
    layer = experts(4)
    hidden, weights, ids = routed(5, 4)
    elsewhere = torch.full((4,), -1)
    assert not grouped_mm.moe_int8(hidden, *layer, weights, ids, "silu", elsewhere).any()
    assert not grouped_mm.moe_int8(hidden, *layer, weights, torch.full_like(ids, -1)).any()
    assert grouped_mm.moe_int8(hidden[:0], *layer, weights[:0], ids[:0]).shape == (0, HIDDEN)


def test_grouping() -> None:
    ids = torch.tensor([[3, 0], [0, 1], [-1, 3]])
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    groups = group_by_expert(weights, ids, 4, None)
    assert groups.experts == (0, 1, 3) and groups.counts == (2, 1, 2)
    assert groups.tokens.tolist() == [0, 1, 1, 0, 2]
    assert groups.weights.tolist() == pytest.approx([0.2, 0.3, 0.4, 0.1, 0.6])
    assert [(expert, pairs.start, pairs.stop) for expert, pairs in groups] == [(0, 0, 2), (1, 2, 3), (3, 3, 5)]
    mapped = group_by_expert(weights, ids, 2, torch.tensor([-1, 0, -1, 1]))
    assert mapped.experts == (0, 1) and mapped.tokens.tolist() == [1, 0, 2]


def test_refusals() -> None:
    layer = experts(2)
    hidden, weights, ids = routed(3, 4)
    with pytest.raises(ValueError, match=r"topk_ids: got 0..\d, expected -1..1"):
        grouped_mm.moe_int8(hidden, *layer, weights, ids)
    with pytest.raises(ValueError, match="activation: got 'relu'"):
        grouped_mm.moe_int8(hidden, *layer, weights, ids % 2, "relu")
    with pytest.raises(ValueError, match="triton: triton launches on GPUs"):
        grouped_mm.moe_int8(hidden, *layer, weights, ids % 2, backend="triton")
    with pytest.raises(ValueError, match="backend: got 'fastest'"):
        grouped_mm.moe_int8(hidden, *layer, weights, ids % 2, backend="fastest")
    with pytest.raises(ValueError, match=r"w2_q: got \(2, 176, 87\)"):
        grouped_mm.moe_int8(hidden, *layer[:2], layer[2][..., 1:], layer[3], weights, ids % 2)
    with pytest.raises(ValueError, match=r"w13_scale: got torch.float32 \(2, 175\)"):
        grouped_mm.moe_int8(hidden, layer[0], layer[1][:, 1:], *layer[2:], weights, ids % 2)
    with pytest.raises(ValueError, match=r"hidden: got torch.float32 \(3, 175\)"):
        grouped_mm.moe_int8(hidden[:, 1:], *layer, weights, ids % 2)
    with pytest.raises(ValueError, match=r"routing: got topk_ids \(3, 3\) and topk_weights \(3, 2\)"):
        grouped_mm.moe_int8(hidden, *layer, weights[:, 1:], ids % 2)
