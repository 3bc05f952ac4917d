"""`num_experts_per_layer`: what is read from it, and what is refused."""

from typing import Any

import pytest
from synthetic import small_config

from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.errors import InputError

EXPERT_TENSORS = ("experts.gate_up_proj", "experts.down_proj", "router.proj.weight", "router.per_expert_scale")


def _config(counts: Any, **sizes: Any) -> dict[str, Any]:
    return small_config(moe=True, **{"num_experts": 6, "num_experts_per_layer": counts, **sizes})


def _counts(n_layers: int) -> list[int]:
    return [6, 2, 5, 3, 4, 6][:n_layers]


def _n_layers() -> int:
    return int(small_config(moe=True)["text_config"]["num_hidden_layers"])


def test_each_layer_has_its_own_experts() -> None:
    counts = _counts(_n_layers())
    architecture = parse_text_architecture(_config(counts))
    shapes = dict(architecture.shapes())
    assert architecture.num_experts == 6
    assert [layer.num_experts for layer in architecture.layers] == counts
    for layer, count in enumerate(counts):
        for name in EXPERT_TENSORS:
            assert shapes[f"{architecture.root}layers.{layer}.{name}"][0] == count


def test_equal_counts_mean_what_no_list_means() -> None:
    n_layers = _n_layers()
    assert parse_text_architecture(_config([6] * n_layers)) == parse_text_architecture(_config(None))


def test_dense_models_have_no_experts() -> None:
    for config in (small_config(), _config(_counts(_n_layers()), enable_moe_block=False)):
        architecture = parse_text_architecture(config)
        assert architecture.num_experts is None
        assert {layer.num_experts for layer in architecture.layers} == {None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda counts: counts[:-1], r"num_experts_per_layer: got \d entries, expected a list of num_hidden_layers"),
        (lambda counts: 6, "num_experts_per_layer: got 6, expected a list"),
        (lambda counts: dict.fromkeys(range(len(counts)), 6), "num_experts_per_layer: got {.*}, expected a list"),
        (lambda counts: [1, *counts[1:]], r"num_experts_per_layer\[0\]: got 1, expected .* top_k_experts = 2 to .* 6"),
        (lambda counts: [7, *counts[1:]], r"num_experts_per_layer\[0\]: got 7, expected"),
        (lambda counts: [counts[0], 4.0, *counts[2:]], r"num_experts_per_layer\[1\]: got 4\.0, expected an integer"),
        (lambda counts: [counts[0], True, *counts[2:]], r"num_experts_per_layer\[1\]: got True, expected an integer"),
        (
            lambda counts: [min(5, count) for count in counts],
            "got at most 5, expected num_experts = 6 in at least one layer",
        ),
    ],
)
def test_bad_lists_are_refused(change: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"config.json: .*{message}"):
        parse_text_architecture(_config(change(_counts(_n_layers()))))
