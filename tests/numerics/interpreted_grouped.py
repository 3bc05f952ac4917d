"""The grouped INT8 kernels on CPU tensors; run with TRITON_INTERPRET=1 set before Triton is imported.

Outputs are float32: the interpreter truncates bfloat16 stores. Prints the name of each check that passed.
"""

import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gemma4q_kernels.grouped_mm import moe_int8, reference
from gemma4q_kernels.grouped_mm.tiles import plan
from gemma4q_kernels.grouped_mm.triton import grouped_scaled_mm, run_experts
from gemma4q_kernels.grouped_mm.triton_routing import route
from gemma4q_kernels.int8_scaled_mm import quantize_per_channel, quantize_per_token
from tolerances import INT8_MOE, rms_error

BOUND = INT8_MOE[torch.float32]
Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def layer_of(experts: int, hidden: int, intermediate: int) -> Layer:
    """Random stacked weights and their scales."""
    quantized = []
    for rows, columns in ((2 * intermediate, hidden), (hidden, intermediate)):
        q, scale = quantize_per_channel(torch.randn(experts * rows, columns) * 0.1)
        quantized += [q.view(experts, rows, columns), scale.view(experts, rows)]
    w13_q, w13_scale, w2_q, w2_scale = quantized
    return w13_q, w13_scale, w2_q, w2_scale


def routing_of(tokens: int, experts: int, top_k: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and distinct ids: of all experts, of a few (the others stay empty), or all tokens to the same."""
    logits = torch.randn(tokens, experts)
    if kind == "few":
        logits[:, top_k + 1 :] -= 1e3
    if kind == "same":
        logits[:] = logits[0].clone()
    weights, ids = logits.softmax(dim=1).topk(top_k)
    return weights, ids.int()


def check_routing(tokens: int, experts: int, top_k: int, kind: str, block_m: int) -> None:
    """Blocks hold each pair once, in order, under its expert, against a sort on the host."""
    ids = routing_of(tokens, experts, top_k, kind)[1]
    ids[::5, 0] = -1
    ids[1::7, -1] = experts + 3
    half = torch.full((experts,), -1, dtype=torch.int32)
    half[1::2] = torch.arange(experts // 2, dtype=torch.int32)
    for expert_map in (None, half):
        local = torch.where((ids < 0) | (ids >= experts), -1, ids).flatten()
        if expert_map is not None:
            local = torch.where(local >= 0, half[local.clamp_min(0).long()], -1)
        blocks = route(ids, experts if expert_map is None else experts // 2, expert_map, block_m)
        order = torch.argsort(local, stable=True)
        found, of = [], []
        for number, (expert, rows) in enumerate(zip(blocks.experts.tolist(), blocks.rows.tolist(), strict=True)):
            assert 0 <= rows <= block_m
            found += blocks.pairs[number * block_m :][:rows].tolist()
            of += [expert] * rows
        assert found == order[local[order] >= 0].tolist()
        assert of == local[found].tolist()
        used = [
            (expert, rows) for expert, rows in zip(blocks.experts.tolist(), blocks.rows.tolist(), strict=True) if rows
        ]
        assert all(rows == block_m for (expert, rows), (after, _) in pairwise(used) if expert == after)


def check_integers(tokens: int, experts: int, top_k: int, n: int, k: int) -> None:
    """With scales of one, each pair's row is the exact integer; rows of pairs without an expert stay as they were."""
    x_q = torch.randint(-128, 128, (tokens, k), dtype=torch.int8)
    w_q = torch.randint(-128, 128, (experts, n, k), dtype=torch.int8)
    ids = routing_of(tokens, experts, top_k, "all")[1]
    ids[0, 0] = -1
    tile, _ = plan("cpu", -(-tokens * top_k // experts), (n, k), (k, n // 2))
    blocks = route(ids, experts, None, tile.block_m)
    out = torch.full((tokens * top_k, n), float("nan"))
    grouped_scaled_mm(x_q, torch.ones(tokens, 1), w_q, torch.ones(experts, n), blocks, out, tile)
    exact = torch.einsum("tk,tsnk->tsn", x_q.double(), w_q[ids.clamp_min(0).long()].double()).flatten(0, 1)
    assert out[0].isnan().all() and torch.equal(out[1:].double(), exact[1:])
    weights, x_scale, w_scale = torch.rand(tokens * top_k), torch.rand(tokens, 1), torch.rand(experts, n)
    grouped_scaled_mm(x_q, x_scale, w_q, w_scale, blocks, out, tile, weights)
    exact *= x_scale.double().repeat_interleave(top_k, 0) * w_scale[ids.flatten().clamp_min(0).long()].double()
    assert rms_error(out[1:], (exact * weights.double().unsqueeze(1))[1:]) <= 3e-7


def check_experts(tokens: int, experts: int, hidden: int, intermediate: int, top_k: int, kind: str) -> None:
    """The whole against the float64 oracle, which a wrong scale is not within the bound of."""
    layer = layer_of(experts, hidden, intermediate)
    x = torch.randn(tokens, hidden)
    weights, ids = routing_of(tokens, experts, top_k, kind)
    got = moe_int8(x, *layer, weights, ids, backend="triton")
    assert got.dtype == x.dtype and rms_error(got, reference.moe_int8(x, *layer, weights, ids)) <= BOUND
    w13_q, w13_scale, w2_q, w2_scale = layer
    for wrong in ((w13_q, w13_scale * 1.1, w2_q, w2_scale), (w13_q, w13_scale, w2_q, w2_scale * 1.1)):
        assert rms_error(got, reference.moe_int8(x, *wrong, weights, ids)) > BOUND


def check_scales() -> None:
    """The same bits twice, and with a column of scales; others where each scale is another."""
    w13_q, w13_scale, w2_q, w2_scale = layer = layer_of(6, 48, 16)
    x = torch.randn(5, 48)
    weights, ids = routing_of(5, 6, 3, "few")

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return moe_int8(x, *tensors, weights, ids, backend="triton")  # type: ignore[arg-type]

    got = run(*layer)
    assert torch.equal(got, run(*layer))
    assert torch.equal(got, run(w13_q, w13_scale.unsqueeze(-1), w2_q, w2_scale.unsqueeze(-1)))
    for wrong in ((w13_q, w13_scale * 1.1, w2_q, w2_scale), (w13_q, w13_scale, w2_q, w2_scale * 1.1)):
        assert rms_error(run(*wrong), reference.moe_int8(x, *layer, weights, ids)) > BOUND


def check_ranks() -> None:
    """Ranks of expert parallelism add up; experts elsewhere and unused slots contribute zero."""
    layer = layer_of(7, 80, 48)
    x = torch.randn(9, 80)
    weights, ids = routing_of(9, 7, 3, "all")
    ids[4, 1] = -1
    whole = reference.moe_int8(x, *layer, weights, ids)
    total = torch.zeros_like(x)
    for local in ([0, 2, 4, 6], [1, 3, 5]):
        expert_map = torch.full((7,), -1, dtype=torch.int32)
        expert_map[local] = torch.arange(len(local), dtype=torch.int32)
        shard = [tensor[local] for tensor in layer]
        part = moe_int8(x, *shard, weights, ids, "gelu_tanh", expert_map, backend="triton")
        assert rms_error(part, reference.moe_int8(x, *shard, weights, ids, "gelu_tanh", expert_map)) <= BOUND
        assert rms_error(part, whole) > BOUND
        total += part
    assert rms_error(total, whole) <= BOUND
    nowhere = torch.full((7,), -1, dtype=torch.int32)
    assert not moe_int8(x, *layer, weights, ids, "silu", nowhere, backend="triton").any()
    assert moe_int8(x[:0], *layer, weights[:0], ids[:0], backend="triton").shape == (0, 80)


def check_activations() -> None:
    layer, x = layer_of(4, 64, 40), torch.randn(6, 64)
    weights, ids = routing_of(6, 4, 2, "all")
    for name in ("gelu_tanh", "silu"):
        expected = reference.moe_int8(x, *layer, weights, ids, name)
        for other in ("gelu_tanh", "silu"):
            got = moe_int8(x, *layer, weights, ids, other, backend="triton")
            assert (rms_error(got, expected) <= BOUND) == (name == other)


def check_buffers_of_engines() -> None:
    """Tokens quantized by the caller, a workspace and an output of the caller's, float16 in between."""
    layer, x = layer_of(4, 64, 40), torch.randn(6, 64)
    weights, ids = routing_of(6, 4, 2, "all")
    out, workspace = torch.full((6, 64), float("nan")), torch.full((6, 2, 80), float("nan"), dtype=torch.float16)
    returned = run_experts(*quantize_per_token(x), *layer, weights, ids.long(), out, workspace=workspace)
    assert returned is out
    assert rms_error(out, reference.moe_int8(x, *layer, weights, ids)) <= INT8_MOE[torch.bfloat16]
    assert not torch.equal(out, moe_int8(x, *layer, weights, ids, backend="triton"))
    assert rms_error(out * 1.1, reference.moe_int8(x, *layer, weights, ids)) > INT8_MOE[torch.bfloat16]


Check = tuple[str, Callable[[], None]]
CHECKS: dict[str, list[Check]] = {
    "fast": [
        ("routing, one launch", partial(check_routing, 7, 98, 3, "all", 16)),
        ("routing, two launches", partial(check_routing, 90, 6, 3, "few", 32)),
        ("routing, all to the same", partial(check_routing, 40, 5, 2, "same", 16)),
        ("integers, K = 176", partial(check_integers, 5, 6, 3, 66, 176)),
        ("integers, ragged K", partial(check_integers, 3, 2, 2, 34, 77)),
        ("98 experts, most of them empty", partial(check_experts, 5, 98, 48, 16, 3, "few")),
        ("integers, large blocks", partial(check_integers, 130, 1, 1, 34, 77)),
        ("scales", check_scales),
        ("ranks", check_ranks),
        ("activations", check_activations),
        ("buffers of engines", check_buffers_of_engines),
    ],
    "wide": [
        (
            f"K = {k}, {tokens} tokens, {experts} experts, {kind}",
            partial(check_experts, tokens, experts, 2816, k, 8, kind),
        )
        for k, tokens, experts, kind in ((176, 1, 98, "all"), (352, 9, 12, "few"), (704, 2, 16, "all"))
    ]
    + [
        (f"integers, K = {k}, {tokens} tokens", partial(check_integers, tokens, 9, 8, 130, k))
        for k, tokens in ((704, 37), (2816, 120))
    ]
    + [(f"routing of {tokens} tokens", partial(check_routing, tokens, 98, 8, "all", 64)) for tokens in (32, 33, 300)],
}


def main() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is NaN from here on
    assert torch.empty(1).isnan()
    for name, check in CHECKS[sys.argv[1]]:
        check()
        print(name)


if __name__ == "__main__":
    main()
