"""How vLLM's Gemma 4 gets layers of different numbers of experts, without an engine."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from synthetic import small_config

from vllm_gemma4q.errors import InputError

pytestmark = pytest.mark.engine

COUNTS = [3, 2, 4]
TOKENS, TOP_K, HIDDEN = 7, 2, 5


def _vllm_config(counts: list[int] | None, folder: Path, **text: Any) -> Any:
    from transformers import AutoConfig

    config = small_config(moe=True, **text) | {"architectures": ["Gemma4ForConditionalGeneration"]}
    if counts is not None:
        config["text_config"]["num_experts_per_layer"] = counts
    (folder / "config.json").write_text(json.dumps(config))
    parallel = SimpleNamespace(enable_eplb=False)
    model = SimpleNamespace(hf_config=AutoConfig.from_pretrained(folder).text_config)
    return SimpleNamespace(model_config=model, parallel_config=parallel)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Layers that are built instead of vLLM's: name and number of experts."""
    from vllm.model_executor.models import gemma4

    layers: list[tuple[str, int]] = []
    monkeypatch.setattr(
        gemma4, "Gemma4DecoderLayer", lambda config, prefix: layers.append((prefix, config.num_experts))
    )
    return layers


def _build(vllm_config: Any) -> None:
    """As `Gemma4Model` does."""
    from vllm.model_executor.models import gemma4

    for layer in range(3):
        gemma4.Gemma4DecoderLayer(vllm_config.model_config.hf_config, prefix=f"model.layers.{layer}")


def test_each_layer_is_built_with_its_own_count(tmp_path: Path, built: list[tuple[str, int]]) -> None:
    from vllm_gemma4q.pruned_moe.model import own_experts_in_each_layer

    pruned, other = _vllm_config(COUNTS, tmp_path), _vllm_config(None, tmp_path)
    with own_experts_in_each_layer(pruned):
        _build(pruned)
    _build(pruned)
    with own_experts_in_each_layer(other):
        _build(other)
    names = [f"model.layers.{layer}" for layer in range(3)]
    assert built == list(zip(names * 3, [*COUNTS, *[4] * 6], strict=True))
    assert pruned.model_config.hf_config.num_experts == 4


def test_a_failure_leaves_vllm_as_it_was(tmp_path: Path, built: list[tuple[str, int]]) -> None:
    from vllm.model_executor.models import gemma4

    from vllm_gemma4q.pruned_moe.model import own_experts_in_each_layer

    before = gemma4.Gemma4DecoderLayer
    with pytest.raises(RuntimeError, match="no memory"), own_experts_in_each_layer(_vllm_config(COUNTS, tmp_path)):
        assert gemma4.Gemma4DecoderLayer is not before
        raise RuntimeError("no memory")
    assert gemma4.Gemma4DecoderLayer is before


@pytest.mark.parametrize(
    ("counts", "eplb", "message"),
    [
        ([3, 2, 5], False, r"num_experts_per_layer\[2\]: got 5, expected an integer from top_k_experts = 2 to"),
        (COUNTS, True, "--enable-eplb: got layers of 2 to 4 experts, expected the same number in all"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tmp_path: Path, built: list[tuple[str, int]], counts: list[int], eplb: bool, message: str
) -> None:
    from vllm_gemma4q.pruned_moe.model import own_experts_in_each_layer

    config = _vllm_config(counts, tmp_path)
    config.parallel_config.enable_eplb = eplb
    with pytest.raises(InputError, match=message), own_experts_in_each_layer(config):
        _build(config)
    assert not built


def test_ranks_together_route_as_one() -> None:
    """Each rank's share, with the places of its own experts, adds up to the whole."""
    from vllm_gemma4q.cpu_expert_parallel import local_routing

    experts = torch.randint(-9, 9, (3, HIDDEN)).double()
    ids = torch.stack([torch.randperm(3)[:TOP_K] for _ in range(TOKENS)]).int()
    weights = torch.randint(1, 9, (TOKENS, TOP_K)).double()
    whole = (weights.unsqueeze(-1) * experts[ids.long()]).sum(dim=1)
    shares = []
    for expert_map, own in ((torch.tensor([0, 1, -1]), experts[:2]), (torch.tensor([-1, -1, 0]), experts[2:])):
        local, places = local_routing(weights, ids, expert_map)
        assert places.dtype == torch.int32 and places.is_contiguous() and local.is_contiguous()
        assert int(places.min()) >= 0 and int(places.max()) < len(own)
        shares.append((local.unsqueeze(-1) * own[places.long()]).sum(dim=1))
    assert torch.equal(shares[0] + shares[1], whole)
    assert not torch.equal(shares[0], whole)


def test_the_entry_point_registers_the_one_model() -> None:
    from vllm.model_executor.models import ModelRegistry

    from vllm_gemma4q.plugin import register_pruned_moe

    register_pruned_moe()
    model = ModelRegistry.models["Gemma4ForCausalLM"]
    register_pruned_moe()
    assert ModelRegistry.models["Gemma4ForCausalLM"] is model
    assert model.module_name == "vllm_gemma4q.model"
