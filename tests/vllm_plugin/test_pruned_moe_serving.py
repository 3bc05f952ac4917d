"""Pruned MoE in a real vLLM on a CPU, in every format and over ranks: what the unpruned model says with routers masked.

The reference is transformers (`pruned_checkpoints.masked_logprobs`). Engines run one after the other in one process;
see `engine.py`.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pruned_moe.pruned_checkpoints import NON_UNIFORM, UNIFORM, Kept, masked_logprobs, prune, swap_experts
from tolerances import FP8_RANKS, MASKED_LOGPROBS, PRUNED_QUANTIZED
from vllm_plugin import checkpoints, fp8_checkpoints
from vllm_plugin.conftest import CORRUPTED_EXPERTS, EXAMPLES, Questions
from vllm_plugin.engine import Answers, EngineError, Request, ask_all, ask_ranks, divergence

pytestmark = [pytest.mark.engine, pytest.mark.slow]

FLOAT32 = {"dtype": "float32"}
EXPERT_PARALLEL = {"enable_expert_parallel": True}


@pytest.fixture(scope="module")
def bf16(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pruned")
    non_uniform = prune(small_models / "moe", folder / "non_uniform", NON_UNIFORM)
    swapped = checkpoints.edit(non_uniform, folder / "swapped", lambda tensors: swap_experts(tensors, 1, 2, 5))
    uniform = prune(small_models / "moe", folder / "uniform", UNIFORM)
    return {"non_uniform": non_uniform, "uniform": uniform, "swapped": swapped}


@pytest.fixture(scope="module")
def quantized(bf16: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What our commands make of the non-uniform checkpoint, in other layouts, and corrupted."""
    folder = tmp_path_factory.mktemp("quantized")
    source, text = bf16["non_uniform"], folder / "text.txt"
    sys.path.insert(0, str(EXAMPLES.parent))
    from small_gemma4 import corpus

    text.write_text("\n\n".join(corpus.training_sections())[:60_000])
    _gemma4q("calibrate", source, folder / "statistics", "--text", text, "--samples", 16, "--max-length", 256)
    int8 = checkpoints.quantize(source, folder / "int8")
    fp8 = folder / "fp8"
    _gemma4q("quantize", source, fp8, "--scheme", "fp8-static", "--statistics", folder / "statistics")
    edit = checkpoints.edit
    return {
        "int8": int8,
        "int8_columns": edit(int8, folder / "int8_columns", _columns),
        "int8_text_only": checkpoints.text_only(int8, folder / "int8_text_only"),
        "int8_corrupted": edit(int8, folder / "int8_bad", lambda t: checkpoints.multiply_half(t, *CORRUPTED_EXPERTS)),
        "fp8": fp8,
        "fp8_fused": edit(fp8, folder / "fp8_fused", fp8_checkpoints.fuse_experts),
        "fp8_corrupted": edit(
            fp8, folder / "fp8_bad", lambda t: fp8_checkpoints.scale_half(t, r"gate_proj\.weight_scale$", 4)
        ),
    }


def _gemma4q(*arguments: object) -> None:
    command = [str(Path(sys.executable).with_name("gemma4q")), *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


def _columns(tensors: checkpoints.Tensors) -> checkpoints.Tensors:
    """Weight scales as columns, [rows, 1]."""
    scales = {name: tensor.reshape(-1, 1) for name, tensor in tensors.items() if name.endswith(".weight_scale")}
    return tensors | scales


@pytest.fixture(scope="module")
def answers(bf16: dict[str, Path], questions: Questions) -> dict[str, Answers]:
    """In float32, with nothing of ours switched on but what unquantized checkpoints need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "gemma4q_pruned_moe")
        requests = [Request(folder, questions.prompts, engine=FLOAT32) for folder in bf16.values()]
        return dict(zip(bf16, ask_all(requests), strict=True))


@pytest.fixture(scope="module")
def quantized_answers(bf16: dict[str, Path], quantized: dict[str, Path], questions: Questions) -> dict[str, Answers]:
    """In BF16, and FP8 in float32 too."""
    folders = {"bf16": bf16["non_uniform"], **quantized}
    no_pictures = {"int8_text_only": {"limit_mm_per_prompt": None}}
    requests = [Request(folder, questions.prompts, engine=no_pictures.get(n, {})) for n, folder in folders.items()]
    requests.append(Request(quantized["fp8"], questions.prompts, engine=FLOAT32))
    return dict(zip([*folders, "fp8_float32"], ask_all(requests), strict=True))


@pytest.fixture(scope="module")
def ranks_answers(bf16: dict[str, Path], quantized: dict[str, Path], questions: Questions) -> dict[str, Answers]:
    """Of two ranks each."""
    engines = {
        "tensor": (bf16["non_uniform"], FLOAT32),
        "expert": (bf16["non_uniform"], EXPERT_PARALLEL | FLOAT32),
        "int8_expert": (quantized["int8"], EXPERT_PARALLEL),
        "fp8_tensor": (quantized["fp8"], FLOAT32),
    }
    requests = [Request(folder, questions.prompts, engine=engine) for folder, engine in engines.values()]
    return dict(zip(engines, ask_ranks(requests), strict=True))


def _deviation(one: Answers, other: Answers) -> float:
    """The greatest difference of a log-probability, in nats."""
    pairs = zip(one.logprobs, other.logprobs, strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


@pytest.mark.parametrize(("variant", "kept"), [("non_uniform", NON_UNIFORM), ("uniform", UNIFORM)])
def test_pruned_is_masked(
    small_models: Path, answers: dict[str, Answers], questions: Questions, variant: str, kept: Kept
) -> None:
    masked = masked_logprobs(small_models / "moe", kept, questions.prompts)
    deviation = _deviation(answers[variant], replace(answers[variant], logprobs=masked))
    print(f"{variant}: {deviation}")
    assert deviation <= MASKED_LOGPROBS


def test_two_experts_swapped_break_the_bound(answers: dict[str, Answers]) -> None:
    deviation = _deviation(answers["non_uniform"], answers["swapped"])
    print(f"swapped: {deviation}")
    assert deviation > MASKED_LOGPROBS


def test_stock_vllm_refuses_different_counts(bf16: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What this is for: without the plugin, loading ends in an assertion about shapes."""
    monkeypatch.setenv("VLLM_PLUGINS", "")
    with pytest.raises(EngineError, match="AssertionError"):
        ask_all([Request(bf16["non_uniform"], [[2, 3, 4]])])


def test_traced_graphs_answer_alike(
    bf16: dict[str, Path],
    answers: dict[str, Answers],
    ask_with: Callable[..., Answers],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `vllm serve` runs without flags, but for the dtype, and the C++ that torch makes of what it traced."""
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    deviation = _deviation(answers["non_uniform"], ask_with(bf16["non_uniform"], enforce_eager=False, **FLOAT32))
    print(f"traced: {deviation}")
    assert deviation <= MASKED_LOGPROBS


def _within(answers: dict[str, Answers], variant: str, scheme: str) -> bool:
    measured = divergence(answers["bf16"], answers[variant])
    print(f"{variant}: {measured}")
    max_kld, min_same_top = PRUNED_QUANTIZED[scheme]
    return measured.mean_kld <= max_kld and measured.same_top >= min_same_top


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_quantized_diverges_little(quantized_answers: dict[str, Answers], scheme: str) -> None:
    assert _within(quantized_answers, scheme, scheme)
    assert not _within(quantized_answers, f"{scheme}_corrupted", scheme)


@pytest.mark.parametrize("variant", ["int8_columns", "int8_text_only", "fp8_fused"])
def test_layouts_are_the_same_model(quantized_answers: dict[str, Answers], variant: str) -> None:
    expected, got = quantized_answers[variant.partition("_")[0]], quantized_answers[variant]
    assert all((a == b).all() for a, b in zip(expected.logprobs, got.logprobs, strict=True))
    assert expected.tokens == got.tokens


@pytest.mark.parametrize("parallel", ["tensor", "expert"])
def test_unquantized_ranks_answer_alike(
    answers: dict[str, Answers], ranks_answers: dict[str, Answers], parallel: str
) -> None:
    deviation = _deviation(answers["non_uniform"], ranks_answers[parallel])
    print(f"{parallel}: {deviation}")
    assert deviation <= MASKED_LOGPROBS
    if parallel == "expert":
        assert "Local/global number of experts: 5/9" in ranks_answers[parallel].log


def test_int8_expert_parallel_ranks_diverge_little(
    quantized_answers: dict[str, Answers], ranks_answers: dict[str, Answers]
) -> None:
    assert _within(quantized_answers | ranks_answers, "int8_expert", "int8")


def test_fp8_ranks_answer_alike(quantized_answers: dict[str, Answers], ranks_answers: dict[str, Answers]) -> None:
    measured = divergence(quantized_answers["fp8_float32"], ranks_answers["fp8_tensor"])
    print(f"tensor: {measured}")
    corrupted = divergence(quantized_answers["fp8_float32"], quantized_answers["fp8_corrupted"])
    assert measured.mean_kld <= FP8_RANKS < corrupted.mean_kld
