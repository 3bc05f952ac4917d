"""Other layouts become vLLM's while they stream by."""

import pytest
import torch

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.quark_int8.mend import mend

LAYER = "model.layers.1."
NORM = f"{LAYER}post_feedforward_layernorm_1"
NONE: frozenset[str] = frozenset()


def test_untouched_tensors_pass_as_they_are() -> None:
    weights = [(f"{LAYER}mlp.up_proj.weight", torch.ones(2, 3, dtype=torch.int8)), ("lm_head.weight", torch.ones(2))]
    assert [(name, id(tensor)) for name, tensor in mend(weights, NONE, {})] == [(n, id(t)) for n, t in weights]


@pytest.mark.parametrize("root", ["model.", "model.language_model.", "language_model.model."])
@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_fused_int8_experts_are_split(root: str, suffix: str) -> None:
    gate_up = torch.randint(-128, 128, (3, 4, 5), dtype=torch.int8)
    down = torch.randint(-128, 128, (3, 5, 2), dtype=torch.int8)
    prefix = f"{root}layers.1.experts."
    got = dict(mend([(f"{prefix}gate_up_proj{suffix}", gate_up), (f"{prefix}down_proj{suffix}", down)], NONE, {}))
    assert len(got) == 9
    for expert in range(3):
        assert torch.equal(got[f"{prefix}{expert}.gate_proj.weight"], gate_up[expert, :2])
        assert torch.equal(got[f"{prefix}{expert}.up_proj.weight"], gate_up[expert, 2:])
        assert torch.equal(got[f"{prefix}{expert}.down_proj.weight"], down[expert])


@pytest.mark.parametrize("suffix", [".weight_scale", "_weight_scale", "_scale", ".scale"])
@pytest.mark.parametrize("trailing", [(), (1,)], ids=["rows", "columns"])
def test_fused_scales_are_split(suffix: str, trailing: tuple[int, ...]) -> None:
    scale = torch.rand(3, 4, *trailing)
    prefix = f"{LAYER}experts."
    got = dict(mend([(f"{prefix}gate_up_proj{suffix}", scale)], NONE, {}))
    assert list(got) == [f"{prefix}{e}.{p}.weight_scale" for e in range(3) for p in ("gate_proj", "up_proj")]
    assert torch.equal(got[f"{prefix}2.up_proj.weight_scale"], scale.reshape(3, 4)[2, 2:])


def test_columns_of_one_experts_scales_become_vectors() -> None:
    name, column = f"{LAYER}experts.2.up_proj.weight_scale", torch.rand(4, 1)
    [(got, scale)] = mend([(name, column)], NONE, {})
    assert got == name and torch.equal(scale, column[:, 0])


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_unquantized_fused_experts_stay_whole(suffix: str) -> None:
    experts = torch.rand(3, 4, 5).bfloat16()
    got = list(mend([(f"{LAYER}experts.gate_up_proj{suffix}", experts)], NONE, {}))
    assert len(got) == 1 and got[0][0] == f"{LAYER}experts.gate_up_proj" and got[0][1] is experts


@pytest.mark.parametrize("order", [("weight", "weight_scale"), ("weight_scale", "weight")])
@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([0.5, 0.25, 2.0])])
def test_int8_norms_are_dequantized_across_calls(order: tuple[str, str], scale: torch.Tensor) -> None:
    rounded = torch.tensor([-128, 3, 127], dtype=torch.int8)
    tensors = {"weight": rounded, "weight_scale": scale}
    int8_norms, halves = frozenset({"layers.1.post_feedforward_layernorm_1"}), {}
    first, second = ([(f"{NORM}.{leaf}", tensors[leaf])] for leaf in order)
    assert list(mend(first, int8_norms, halves)) == []
    [(name, weight)] = mend(second, int8_norms, halves)
    assert name == f"{NORM}.weight" and not halves
    assert torch.equal(weight, rounded.float() * scale)


def test_zero_points_are_dropped_where_they_are_zero() -> None:
    name = f"{LAYER}mlp.up_proj.weight_zero_point"
    assert list(mend([(name, torch.zeros(4, dtype=torch.int8))], NONE, {})) == []
    with pytest.raises(InputError, match=r"tensor model.layers.1.mlp.up_proj.weight_zero_point: got zero points other"):
        list(mend([(name, torch.tensor([0, 0, 1, 0], dtype=torch.int8))], NONE, {}))
