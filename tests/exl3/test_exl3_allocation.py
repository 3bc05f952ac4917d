"""Bits of every linear: the published 31B's, the rule spelled out once more, and what holds for any model."""

from collections import Counter

import pytest
from exl3_runs import FULL, SLIDING, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import CONFIG_26B_A4B, CONFIG_31B, shapes, write_header_only

from vllm_gemma4q.architecture import Role, layer_index, role_of
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.exl3.allocation import allocate, mean_bits, padded_weights
from vllm_gemma4q.exl3.quantize import QUANTIZED_ROLES, Options, plan
from vllm_gemma4q.linears import linears_of

SHARDS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def linears_in(folder, config):
    checkpoint = open_checkpoint(write_header_only(folder / "model", config, shapes(config).items()))
    tensors = [tensor for tensor in checkpoint.tensors.values() if role_of(tensor.name) in QUANTIZED_ROLES]
    return [linear for tensor in tensors for linear in linears_of(tensor)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return linears_in(tmp_path_factory.mktemp("dense"), CONFIG_31B)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return linears_in(tmp_path_factory.mktemp("moe"), CONFIG_26B_A4B)


def group_of(linear):
    last = linear.module.rpartition(".")[2]
    if role_of(linear.module) is Role.EXPERTS:
        return layer_index(linear.module), "experts"
    return layer_index(linear.module), SHARDS.get(last, last)


def test_31b_at_three_and_a_half_bits_is_as_published(dense):
    bits = allocate(dense, 3.5)
    counts = Counter((group_of(linear)[1], bits[linear.module]) for linear in dense)
    assert counts == {
        ("qkv", 4): 60 + 60 + 50,  # ten global layers store no values
        ("o_proj", 4): 60,
        ("gate_up", 4): 2 * 18,
        ("gate_up", 3): 2 * 42,
        ("down_proj", 4): 17,
        ("down_proj", 3): 43,
    }
    assert round(mean_bits(dense, bits), 2) == 3.5


def test_layers_at_both_ends_rise_first(dense):
    bits = allocate(dense, 3.5)
    layers = {
        name: sorted({group_of(n)[0] for n in dense if group_of(n)[1] == name and bits[n.module] == 4})
        for name in ("gate_up", "down_proj")
    }
    assert layers["gate_up"] == [*range(9), *range(51, 60)]
    assert layers["down_proj"] == [*range(9), *range(52, 60)]


def test_experts_rise_last_and_as_a_layer(moe):
    bits = allocate(moe, 2.5)
    counts = {}
    for linear in moe:
        counts.setdefault(role_of(linear.module), Counter())[bits[linear.module]] += 1
    assert min(counts[Role.ATTENTION]) == min(counts[Role.MLP]) == 3
    assert set(counts[Role.EXPERTS]) == {2, 3}
    assert counts[Role.EXPERTS][3] % (3 * 128) == 0
    left, smallest = 2.5 - mean_bits(moe, bits), 2176 * 2816
    assert 0 <= left < smallest / sum(map(padded_weights, moe)), "what is too little for experts goes to the others"


@pytest.mark.parametrize("bits", range(1, 9))
def test_whole_targets_are_met_exactly(dense, bits):
    assert set(allocate(dense, bits).values()) == {bits}


def by_the_rule(linears, bpw):
    """The rule, plainly: rounds over all groups in order; who fits into what is left gains a bit."""
    groups, total = {}, sum(padded_weights(linear) for linear in linears)
    for linear in linears:
        groups.setdefault(group_of(linear), []).append(linear)
    last = max(layer for layer, _ in groups)
    order = {"qkv": (0, 0), "o_proj": (0, 1), "gate_up": (1, 0), "down_proj": (1, 1), "experts": (2, 0)}
    ranked = sorted(groups, key=lambda g: (order[g[1]][0], min(g[0], last - g[0]), g[0], order[g[1]][1]))
    bits = dict.fromkeys(groups, int(bpw))
    used, most = int(bpw) * total, int(bpw * total)
    before = None
    while before != used:
        before = used
        for group in ranked:
            cost = sum(padded_weights(linear) for linear in groups[group])
            if bits[group] < 8 and used + cost <= most:
                bits[group] += 1
                used += cost
    return {linear.module: bits[group] for group, members in groups.items() for linear in members}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bpw=st.floats(1, 8), layers=st.integers(1, 7), moe=st.booleans())
def test_is_the_rule_for_any_model(tmp_path_factory, bpw, layers, moe):
    types = [SLIDING, FULL] * 4
    linears = linears_in(tmp_path_factory.mktemp("any"), tiny_config(*types[:layers], moe=moe, hidden_size=200))
    bits = allocate(linears, bpw)
    assert bits == by_the_rule(linears, bpw)
    assert list(bits) == [linear.module for linear in linears]
    assert mean_bits(linears, bits) <= bpw


@pytest.mark.parametrize("config", [CONFIG_31B, CONFIG_26B_A4B], ids=["31B", "26B-A4B"])
def test_plans_of_the_real_models_need_headers_only(tmp_path, config):
    source = open_checkpoint(write_header_only(tmp_path / "model", config, shapes(config).items()))
    conversion = plan(source, Options(3.5), None)
    layers = config["text_config"]["num_hidden_layers"]
    names = [{output.name.partition(".layers.")[2].partition(".")[0] for output in shard.outputs}
             for shard in conversion.shards[1:-1]]  # fmt: skip
    assert names == [{str(layer)} for layer in range(layers)]
    for row in conversion.details["bits"].values():
        assert row["bpw"] == pytest.approx(8 * row["bytes"] / row["weights"], abs=1e-4)
        assert row["bpw"] > min(map(int, row["linears"]))


def test_sizes_of_the_31b(tmp_path):
    """A weight's K bits, and two bytes for each input and output: no size of the 31B needs padding."""
    source = open_checkpoint(write_header_only(tmp_path / "model", CONFIG_31B, shapes(CONFIG_31B).items()))
    conversion = plan(source, Options(3.5), None)
    rows = conversion.details["bits"]
    down, gate = 5376 * 21504, 2 * 5376 * 21504
    mlp = (4 * (18 * gate + 17 * down) + 3 * (42 * gate + 43 * down)) // 8 + 60 * 3 * (2 * (5376 + 21504) + 4)
    assert rows["mlp"]["bytes"] == mlp
    assert rows["lm_head"]["bytes"] == 5376 * 262144 * 6 // 8 + 2 * (5376 + 262144) + 4
    assert rows["attention"]["bpw"] == pytest.approx(4, abs=0.01)
    assert rows["layers"]["bytes"] == rows["attention"]["bytes"] + mlp
    assert rows["layers"]["bpw"] == pytest.approx(3.503, abs=0.001)
    assert conversion.summary["embedding"]["bytes_after"] == 2 * 5376 * 262144
