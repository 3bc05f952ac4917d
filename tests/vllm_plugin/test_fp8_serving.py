"""FP8 checkpoints with static scales in a real vLLM on a CPU: close to BF16, what the format says, equal over ranks.

Engines run one after the other in one process a family; see `engine.py`.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tolerances import FP8_DEFINITION, FP8_DIVERGENCE, FP8_RANKS
from vllm_plugin import fp8_checkpoints as fp8
from vllm_plugin import fp8_definition
from vllm_plugin.checkpoints import Tensors, load, unquantize
from vllm_plugin.conftest import EXAMPLES, Family, Questions
from vllm_plugin.engine import Answers, EngineError, Request, ask_all, ask_ranks, divergence, engine_environment

from vllm_gemma4q.errors import InputError

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TOWER = r"vision_tower.*proj\.linear\.weight$"
ROUTER = r"router\.proj\.weight$"
FULL_LAYER = f"{fp8.LAYERS}2."  # full attention: no v_proj
# Sums in another order flip roundings to E4M3; in BF16, so many that equal functions look different.
FLOAT32 = {"dtype": "float32"}
DISAGREES = "config.json's list of ignored modules disagrees with the weights"
# The same modules, in the words of different tools.
LISTS = {
    "parts": ["vision_tower", "embed_vision", "embed_tokens", "lm_head"],
    "patterns": ["re:.*vision.*", "re:.*embed_tokens", "lm_head"],
    "engine_names": ["vision_tower", "embed_vision.embedding_projection", "language_model.model.embed_tokens"],
    "empty": [],
}
SAME = ["engine_names", "empty", "leftovers", "virtual_values", "compressed_tensors"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """What inputs are observed on: text that the questions do not come from."""
    sys.path.insert(0, str(EXAMPLES.parent))
    from small_gemma4 import corpus

    return corpus.training_sections()[:6]


def _corrupted(folder: Path, source: Path, name: str, pattern: str, factor: float) -> Path:
    return fp8.variant(source, folder / name, lambda tensors: fp8.scale_half(tensors, pattern, factor))


@pytest.fixture(scope="module")
def dense(small_models: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Family:
    bf16, folder = small_models / "dense", tmp_path_factory.mktemp("fp8_dense")
    listed = fp8.linears_outside(bf16)
    exact = fp8.quantize(bf16, folder / "fp8", fp8.observe(bf16, texts), listed)
    variants = {"fp8": exact}
    for style in ("engine_names", "empty"):
        variants[style] = fp8.variant(exact, folder / style, ignored=LISTS[style])
    variants["leftovers"] = fp8.variant(
        exact, folder / "leftovers", lambda tensors: fp8.leave_scales(tensors, TOWER), LISTS["parts"]
    )
    variants["virtual_values"] = fp8.variant(
        exact, folder / "virtual", _virtual_scales, [*listed, *fp8.virtual_values(bf16)]
    )
    variants["compressed_tensors"] = fp8.reconfigured(
        fp8.variant(exact, folder / "compressed_tensors", fp8.by_channel), fp8.compressed_tensors(LISTS["patterns"])
    )
    variants["bf16_attention"] = fp8.variant(
        exact,
        folder / "bf16_attention",
        lambda tensors: unquantize(tensors, load(bf16), f"{FULL_LAYER}self_attn."),
        [*listed, f"{FULL_LAYER}self_attn"],
    )
    variants["clipping"] = _corrupted(folder, exact, "clipping", r"\.input_scale$", 1 / 8)
    variants["wrong_weights"] = _corrupted(folder, exact, "wrong_weights", r"gate_proj\.weight_scale$", 4)
    return Family(bf16, variants)


def _virtual_scales(tensors: Tensors) -> Tensors:
    """Scales of values that are the keys, as tools leave them that walk over a template of module names."""
    name = f"{FULL_LAYER}self_attn.k_proj.input_scale"
    return tensors | {name.replace("k_proj", "v_proj"): tensors[name]}


@pytest.fixture(scope="module")
def moe(small_models: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Family:
    bf16, folder = small_models / "moe", tmp_path_factory.mktemp("fp8_moe")
    exact = fp8.quantize(bf16, folder / "fp8", fp8.observe(bf16, texts), fp8.linears_outside(bf16))
    variants = {
        "fp8": exact,
        "fused": fp8.variant(exact, folder / "fused", fp8.fuse_experts),
        "by_channel": fp8.variant(exact, folder / "by_channel", fp8.by_channel),
        "leftovers": fp8.variant(
            exact, folder / "leftovers", lambda tensors: fp8.leave_scales(tensors, ROUTER), ["re:.*router", "lm_head"]
        ),
        "clipping": _corrupted(folder, exact, "clipping", r"\.input_scale$", 1 / 8),
        "wrong_weights": _corrupted(folder, exact, "wrong_weights", r"gate_proj\.weight_scale$", 4),
    }
    return Family(bf16, variants)


def _ask_family(family: Family, questions: Questions) -> dict[str, Answers]:
    folders = {"bf16": family.bf16, **family.variants}
    requests = [Request(folder, questions.prompts, questions.pictures) for folder in folders.values()]
    requests.append(Request(family.variants["fp8"], questions.prompts, engine=FLOAT32))
    return dict(zip([*folders, "float32"], ask_all(requests), strict=True))


@pytest.fixture(scope="module")
def dense_answers(dense: Family, questions: Questions) -> dict[str, Answers]:
    return _ask_family(dense, questions)


@pytest.fixture(scope="module")
def moe_answers(moe: Family, questions: Questions) -> dict[str, Answers]:
    return _ask_family(moe, questions)


def _within(reference: Answers, other: Answers, kind: str) -> bool:
    measured = divergence(reference, other)
    print(f"{kind}: {measured}")
    max_kld, min_same_top = FP8_DIVERGENCE[kind]
    return measured.mean_kld <= max_kld and measured.same_top >= min_same_top


def _assert_same(expected: Answers, got: Answers) -> None:
    assert all((a == b).all() for a, b in zip(expected.logprobs, got.logprobs, strict=True))
    assert expected.tokens == got.tokens


@pytest.mark.parametrize("variant", ["fp8", "bf16_attention"])
def test_dense_diverges_little(dense_answers: dict[str, Answers], variant: str) -> None:
    assert _within(dense_answers["bf16"], dense_answers[variant], "dense")


def test_moe_diverges_little(moe_answers: dict[str, Answers]) -> None:
    assert _within(moe_answers["bf16"], moe_answers["fp8"], "moe")


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("variant", ["clipping", "wrong_weights"])
def test_corrupted_scales_break_the_bound(kind: str, variant: str, request: pytest.FixtureRequest) -> None:
    answers = request.getfixturevalue(f"{kind}_answers")
    assert not _within(answers["bf16"], answers[variant], kind)


@pytest.mark.parametrize("variant", SAME)
def test_what_must_change_nothing(dense_answers: dict[str, Answers], variant: str) -> None:
    _assert_same(dense_answers["fp8"], dense_answers[variant])


@pytest.mark.parametrize("variant", ["fused", "by_channel", "leftovers"])
def test_layouts_of_experts_are_the_same_experts(moe_answers: dict[str, Answers], variant: str) -> None:
    _assert_same(moe_answers["fp8"], moe_answers[variant])


def test_pictures_are_answered_through_the_unquantized_tower(
    dense_answers: dict[str, Answers], moe_answers: dict[str, Answers]
) -> None:
    for answers in (dense_answers, moe_answers):
        assert len(set(answers["bf16"].texts)) > 1
        for variant in ("fp8", "leftovers"):
            assert answers[variant].texts == answers["bf16"].texts


def test_the_log_says_what_was_done(dense_answers: dict[str, Answers]) -> None:
    log = dense_answers["fp8"].log
    assert log.count("FP8 on a CPU: weights stay in E4M3") == 1
    assert DISAGREES not in log and "leftover scales" not in log
    assert f"{DISAGREES} on" not in dense_answers["bf16_attention"].log
    dropped = re.findall(
        r"Dropped (\d+) leftover scales of modules that are not quantized: (\S+)\.input_scale, ",
        dense_answers["leftovers"].log,
    )
    assert dropped == [("28", "model.vision_tower.encoder.layers.0.mlp.down_proj.linear")]


def test_answers_are_what_the_format_says(
    dense: Family, dense_answers: dict[str, Answers], questions: Questions
) -> None:
    """In float32, where no other rounding blurs it: inputs are rounded as FP8 hardware does, weights once."""
    folder, engine = dense.variants["fp8"], dense_answers["float32"]
    told, weight_only = (
        replace(engine, logprobs=fp8_definition.logprobs(dense.bf16, folder, questions.prompts, rounded))
        for rounded in (True, False)
    )
    print(divergence(told, engine), divergence(weight_only, engine))
    assert divergence(told, engine).mean_kld <= FP8_DEFINITION
    assert divergence(weight_only, engine).mean_kld > FP8_DEFINITION


@pytest.fixture(scope="module")
def ranks_answers(dense: Family, moe: Family, questions: Questions) -> dict[str, Answers]:
    """By kind, of two ranks each, in float32."""
    folders = {"dense": dense.variants["fp8"], "moe": moe.variants["fp8"]}
    requests = [Request(folder, questions.prompts, engine=FLOAT32) for folder in folders.values()]
    return dict(zip(folders, ask_ranks(requests), strict=True))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_two_ranks_answer_alike(
    kind: str, request: pytest.FixtureRequest, questions: Questions, ranks_answers: dict[str, Answers]
) -> None:
    answers, together = request.getfixturevalue(f"{kind}_answers"), ranks_answers[kind]
    assert together.tokens[len(questions.text) :] == answers["float32"].tokens[len(questions.text) :]
    measured = divergence(answers["float32"], together)
    print(f"{kind}, two ranks: {measured}")
    assert measured.mean_kld <= FP8_RANKS < divergence(answers["float32"], answers["fp8"]).mean_kld


def test_traced_graphs_diverge_little(
    moe: Family, moe_answers: dict[str, Answers], ask_with: Callable[..., Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `vllm serve` runs without flags, but for the C++ that torch makes of what it traced."""
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    assert _within(moe_answers["bf16"], ask_with(moe.variants["fp8"], enforce_eager=False), "moe")


def test_stock_vllm_fails_on_a_cpu(dense: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this plugin is for; with only the other method of ours switched on."""
    monkeypatch.setenv("VLLM_PLUGINS", "gemma4q_quark_int8")
    with pytest.raises(EngineError, match=r"_C::static_scaled_fp8_quant\(\) expected at most 0 argument"):
        ask_all([Request(dense.variants["fp8"], [[2, 3, 4]])])


@pytest.mark.parametrize(
    "pattern", [TOWER, r"embed_vision.*\.weight$", ROUTER], ids=["tower", "embed_vision", "router"]
)
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "not-listed"])
def test_a_damaged_checkpoint_is_refused(
    moe: Family, pattern: str, listed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized by mistake: with the list as it should have been, and with one that says nothing of it."""
    ignored = fp8.linears_outside(moe.bf16) if listed else ["lm_head"]
    damaged = fp8.variant(
        moe.variants["fp8"], tmp_path / "damaged", lambda tensors: fp8.damage(tensors, pattern), ignored
    )
    with pytest.raises(InputError, match=r"tensor \S+: got F8_E4M3, expected BF16: .*`gemma4q restore QUANT BASE DST`"):
        _engine_config(damaged, monkeypatch)


def test_a_leftover_that_no_list_covers_is_refused(
    dense: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fp8.variant(dense.variants["fp8"], tmp_path / "left", lambda t: fp8.leave_scales(t, TOWER), ["lm_head"])
    with pytest.raises(InputError, match="got a scale, but its module is not quantized .*`gemma4q restore"):
        _engine_config(folder, monkeypatch)


def _engine_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    for name, value in engine_environment().items():
        monkeypatch.setenv(name, value)
    return EngineArgs(model=str(folder), enforce_eager=True, max_model_len=256).create_engine_config()


def test_a_scale_of_zero_is_refused(dense: Family, tmp_path: Path) -> None:
    name = f"{fp8.LAYERS}1.self_attn.o_proj.input_scale"
    folder = fp8.variant(dense.variants["fp8"], tmp_path / "zero", lambda tensors: tensors | {name: tensors[name] * 0})
    with pytest.raises(EngineError, match=r"o_proj\.input_scale: got 0, expected a positive number"):
        ask_all([Request(folder, [[2, 3, 4]])])


def test_dummy_weights(dense: Family, moe: Family, questions: Questions) -> None:
    """With which speed and memory are measured: vLLM's loader makes the scales up, too."""
    requests = [Request(family.variants["fp8"], questions.prompts[:1], engine={"load_format": "dummy"})
                for family in (dense, moe)]  # fmt: skip
    for answers in ask_all(requests):
        assert np.isfinite(answers.logprobs[0]).all() and len(answers.tokens[0])
