"""Pruned checkpoints in transformers: the unpruned model with its router masked, and what the free knobs do there."""

import random

import pruned_checkpoints
import pytest
import torch
from prune_files import EXAMPLE, LAYERS, N_LAYERS, NUM_EXPERTS, config, differences, retained, run
from pruned_checkpoints import NON_UNIFORM, UNIFORM, masked_logprobs
from tolerances import PRUNED_LOGPROBS, TRANSFERRED_ROUTER, rms_error
from vllm_plugin.checkpoints import edit, load

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.pruned_moe.knobs import transferred
from vllm_gemma4q.pruned_moe.prune import Options, plan

NORM = f"{LAYERS}1.post_feedforward_layernorm_1.weight"
ROUTER = f"{LAYERS}1.router.proj.weight"


@pytest.fixture(scope="module")
def prompts():
    generator = random.Random(0)
    return [[2, *(generator.randrange(20, 1000) for _ in range(95))] for _ in range(3)]


def logprobs(folder, prompts):
    """Of a checkpoint as it is: nothing masked."""
    counts = config(folder)["text_config"]["num_experts"]
    return torch.cat([torch.tensor(one) for one in masked_logprobs(folder, [range(counts)] * N_LAYERS, prompts)])


@pytest.fixture(scope="module")
def unpruned(prompts):
    return logprobs(EXAMPLE, prompts)


def test_pruned_is_the_unpruned_with_its_router_masked(prompts, unpruned, tmp_path):
    run(EXAMPLE, tmp_path / "target", UNIFORM)
    got = logprobs(tmp_path / "target", prompts)
    expected = torch.cat([torch.tensor(one) for one in masked_logprobs(EXAMPLE, UNIFORM, prompts)])
    assert rms_error(got, expected) < PRUNED_LOGPROBS
    assert rms_error(got, unpruned) > 100 * PRUNED_LOGPROBS
    other = [[*UNIFORM[0][:-1], 13], *UNIFORM[1:]]  # in place of 15
    elsewhere = torch.cat([torch.tensor(one) for one in masked_logprobs(EXAMPLE, other, prompts)])
    assert rms_error(got, elsewhere) > 10 * PRUNED_LOGPROBS


def test_shared_boost_multiplies_what_the_norm_gives(tmp_path, prompts, unpruned):
    result = run(EXAMPLE, tmp_path / "boosted", [range(NUM_EXPERTS)] * N_LAYERS, Options(shared_boost=1.2))
    before = load(EXAMPLE)
    norms = [name for name in before if name.endswith("post_feedforward_layernorm_1.weight")]
    assert differences(result, before) == sorted(norms)
    assert len(norms) == N_LAYERS
    assert torch.equal(result[NORM], (before[NORM].float() * 1.2).bfloat16())
    assert rms_error(logprobs(tmp_path / "boosted", prompts), unpruned) > 100 * PRUNED_LOGPROBS


def test_published_place_of_the_boost_does_nothing(tmp_path, prompts, unpruned):
    """The norm behind `mlp.down_proj` divides a factor out, but for its epsilon. By 2, which is exact in bfloat16."""
    edit(EXAMPLE, tmp_path / "vain", lambda tensors: {
        name: tensor * 2 if name.endswith("mlp.down_proj.weight") and "language_model" in name else tensor
        for name, tensor in tensors.items()
    })  # fmt: skip
    assert differences(load(tmp_path / "vain"), load(EXAMPLE))
    assert rms_error(logprobs(tmp_path / "vain", prompts), unpruned) < PRUNED_LOGPROBS
    doubled = run(EXAMPLE, tmp_path / "norm", [range(NUM_EXPERTS)] * N_LAYERS, Options(shared_boost=2.0))
    assert torch.equal(doubled[NORM], load(EXAMPLE)[NORM] * 2)
    assert rms_error(logprobs(tmp_path / "norm", prompts), unpruned) > 100 * PRUNED_LOGPROBS


def transferred_by_hand(router, kept, share):
    """Row by row, in float32 lists."""
    rows, result = router.float(), {expert: router[expert].float().clone() for expert in kept}
    for expert in range(len(rows)):
        if expert not in kept:
            cosines = [(float(torch.cosine_similarity(rows[expert], rows[other], dim=0)), other) for other in kept]
            for _, other in sorted(cosines, reverse=True)[:3]:
                result[other] += share * rows[expert]
    return torch.stack([result[expert] for expert in kept])


@pytest.mark.parametrize("kept", [NON_UNIFORM[1], (2, 9), tuple(range(15))], ids=lambda kept: str(len(kept)))
def test_soft_transfer_adds_dropped_rows_to_their_nearest(kept):
    router = load(EXAMPLE)[ROUTER]
    got, expected = transferred(router, kept, 0.3), transferred_by_hand(router, kept, 0.3)
    assert (got.dtype, got.shape) == (router.dtype, (len(kept), router.shape[1]))
    assert rms_error(got, expected) < TRANSFERRED_ROUTER
    assert rms_error(got, transferred_by_hand(router, kept, 0.33)) > TRANSFERRED_ROUTER
    assert not torch.equal(got, router[list(kept)])


def test_soft_transfer_changes_routers_alone(tmp_path):
    result = run(EXAMPLE, tmp_path / "target", NON_UNIFORM, Options(soft_transfer=0.3))
    plain = load(pruned_checkpoints.prune(EXAMPLE, tmp_path / "plain", NON_UNIFORM))
    assert differences(result, plain) == [f"{LAYERS}{layer}.router.proj.weight" for layer in (0, 1)]
    assert torch.equal(result[ROUTER], transferred(load(EXAMPLE)[ROUTER], NON_UNIFORM[1], 0.3))


def test_top_k_is_in_the_configuration_alone(tmp_path, prompts, unpruned):
    result = run(EXAMPLE, tmp_path / "target", [range(NUM_EXPERTS)] * N_LAYERS, Options(top_k=3))
    assert not differences(result, load(EXAMPLE))
    assert config(tmp_path / "target")["text_config"]["top_k_experts"] == 3
    assert rms_error(logprobs(tmp_path / "target", prompts), unpruned) > 100 * PRUNED_LOGPROBS


def test_every_choice_is_part_of_the_identity():
    source, choices = open_checkpoint(EXAMPLE), [NON_UNIFORM, UNIFORM]
    options = [Options(), Options(shared_boost=1.1), Options(soft_transfer=0.2), Options(top_k=3)]
    identities = [plan(source, retained(kept), option).identity()["plan"] for kept in choices for option in options]
    assert len(set(identities)) == len(identities)
    assert plan(source, retained(UNIFORM)).identity()["plan"] == identities[4]
