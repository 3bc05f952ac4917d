"""Quark INT8 checkpoints in a real vLLM on a CPU: close to BF16, equal over ranks, in every layout of experts."""

from collections.abc import Callable

import pytest
from tolerances import QUARK_INT8_DIVERGENCE
from vllm_plugin.conftest import Family, Questions
from vllm_plugin.engine import Answers, Request, ask_ranks, divergence

pytestmark = [pytest.mark.engine, pytest.mark.slow]

DISAGREES = "config.json's exclude list disagrees with the weights"


def _within(answers: dict[str, Answers], variant: str, bound: tuple[float, float]) -> bool:
    measured = divergence(answers["bf16"], answers[variant])
    print(f"{variant}: {measured}")
    max_kld, min_same_top = bound
    return measured.mean_kld <= max_kld and measured.same_top >= min_same_top


def test_bf16_is_sure_of_its_text(dense_answers: dict[str, Answers], moe_answers: dict[str, Answers]) -> None:
    """Otherwise a small divergence would prove nothing."""
    for answers in (dense_answers, moe_answers):
        assert max(scores.max() for scores in answers["bf16"].logprobs) > -0.1


@pytest.mark.parametrize("variant", ["int8", "bf16_attention", "odd_excludes", "no_excludes", "text_only"])
def test_dense_diverges_little(dense_answers: dict[str, Answers], variant: str) -> None:
    assert _within(dense_answers, variant, QUARK_INT8_DIVERGENCE["dense"])


@pytest.mark.parametrize("variant", ["int8", "fused", "slips"])
def test_moe_diverges_little(moe_answers: dict[str, Answers], variant: str) -> None:
    assert _within(moe_answers, variant, QUARK_INT8_DIVERGENCE["moe"])


@pytest.mark.parametrize("kind, variant", [("dense", "corrupted"), ("moe", "corrupted"), ("moe", "corrupted_experts")])
def test_corrupted_scales_break_the_bound(kind: str, variant: str, request: pytest.FixtureRequest) -> None:
    assert not _within(request.getfixturevalue(f"{kind}_answers"), variant, QUARK_INT8_DIVERGENCE[kind])


@pytest.mark.parametrize("variant", ["odd_excludes", "no_excludes", "text_only"])
def test_what_must_change_nothing(dense_answers: dict[str, Answers], variant: str) -> None:
    _assert_same(dense_answers["int8"], dense_answers[variant])


def test_fused_experts_are_the_same_experts(moe_answers: dict[str, Answers]) -> None:
    _assert_same(moe_answers["int8"], moe_answers["fused"])


def _assert_same(expected: Answers, got: Answers) -> None:
    assert all((a == b).all() for a, b in zip(expected.logprobs, got.logprobs, strict=True))
    assert expected.tokens == got.tokens


def test_pictures_are_answered_alike(dense_answers: dict[str, Answers], moe_answers: dict[str, Answers]) -> None:
    for answers in (dense_answers, moe_answers):
        assert len(set(answers["bf16"].texts)) > 1
        assert answers["int8"].texts == answers["bf16"].texts


def test_a_wrong_exclude_list_is_reported(dense_answers: dict[str, Answers]) -> None:
    assert DISAGREES not in dense_answers["int8"].log
    assert f"{DISAGREES} on 3 modules, e.g. model.language_model.layers.0.self_attn.k_proj is int8" in (
        dense_answers["odd_excludes"].log
    )


def test_an_output_layer_in_int8_on_demand(
    dense: Family, dense_answers: dict[str, Answers], questions: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA4Q_INT8_LM_HEAD", "1")
    (got,) = ask_ranks([Request(dense.variants["int8"], questions.prompts)])
    assert _within(dense_answers | {"int8 head": got}, "int8 head", QUARK_INT8_DIVERGENCE["dense"])
    assert any((a != b).any() for a, b in zip(got.logprobs, dense_answers["int8"].logprobs, strict=True))


def _assert_alike(answers: dict[str, Answers], together: Answers, questions: Questions, kind: str) -> None:
    assert together.tokens[len(questions.text) :] == answers["int8"].tokens[len(questions.text) :]
    assert _within(answers | {"two ranks": together}, "two ranks", QUARK_INT8_DIVERGENCE[kind])


def test_two_ranks_answer_alike(
    dense: Family, dense_answers: dict[str, Answers], questions: Questions, ask_with: Callable[..., Answers]
) -> None:
    """In vLLM's usual processes."""
    together = ask_with(dense.variants["int8"], tensor_parallel_size=2)
    _assert_alike(dense_answers, together, questions, "dense")


def test_two_ranks_with_experts_answer_alike(
    moe: Family, moe_answers: dict[str, Answers], questions: Questions
) -> None:
    """Each expert on both ranks, then half of the experts on each."""
    folder = moe.variants["int8"]
    expert_parallel = Request(folder, questions.prompts, engine={"enable_expert_parallel": True})
    together, apart = ask_ranks([Request(folder, questions.prompts), expert_parallel])
    _assert_alike(moe_answers, together, questions, "moe")
    assert _within(moe_answers | {"expert parallel": apart}, "expert parallel", QUARK_INT8_DIVERGENCE["moe"])


def test_compiled_graphs_diverge_little(
    moe: Family, moe_answers: dict[str, Answers], ask_with: Callable[..., Answers]
) -> None:
    """As `vllm serve` runs without flags."""
    compiled = ask_with(moe.variants["int8"], enforce_eager=False)
    assert _within(moe_answers | {"compiled": compiled}, "compiled", QUARK_INT8_DIVERGENCE["moe"])
