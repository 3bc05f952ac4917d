"""EXL3 in a real vLLM on a CPU: what the decoded weights say, packed in memory, equal over ranks and compiled.

Random trellises, so answers are noise, but the same noise. In float32, where nothing else rounds. Engines on one rank
run one after the other in one process; see `engine.py`.
"""

import logging
from pathlib import Path

import numpy as np
import pytest
from tolerances import EXL3_SERVED, EXL3_SERVED_BF16
from vllm_plugin import exl3_checkpoints as exl3
from vllm_plugin.conftest import Questions
from vllm_plugin.engine import Answers, Request, ask, ask_all, ask_ranks, divergence, engine_environment

from vllm_gemma4q.errors import InputError

pytestmark = [pytest.mark.engine, pytest.mark.slow]

FLOAT32 = {"dtype": "float32"}
KINDS = ("dense", "moe")
CORRUPTED = r"\.1\.experts\.\d+\.up_proj\.suh$"
# The mean of `exl3.FORMATS`, 4.7, and what padding costs: keys of 64 and experts of 64 fill half a block.
BITS = {"dense": 5, "moe": 9}
DISAGREES = "quantization_config.json disagrees with the weights"


@pytest.fixture(scope="module")
def checkpoints(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By kind and variant: `dense/packed` and so on."""
    folder = tmp_path_factory.mktemp("exl3")
    found = {}
    for kind in KINDS:
        packed, decoded = exl3.make(small_models / kind, folder / kind / "packed", folder / kind / "decoded")
        found |= {f"{kind}/packed": packed, f"{kind}/decoded": decoded}
    found["moe/corrupted"] = exl3.edit(
        found["moe/packed"], folder / "corrupted", lambda tensors: exl3.scale_half(tensors, CORRUPTED, 1.1)
    )
    return found


@pytest.fixture(scope="module")
def prompts(questions: Questions) -> list[list[int]]:
    """Few: what random weights say of one text, they say of all."""
    return [questions.text[0][:96], questions.text[1][:40], questions.chats[0]]


@pytest.fixture(scope="module")
def answers(checkpoints: dict[str, Path], questions: Questions, prompts: list[list[int]]) -> dict[str, Answers]:
    """By kind and variant, in float32; `dense/bfloat16` is packed."""
    requests = {
        name: Request(folder, prompts, questions.pictures[:1], engine=FLOAT32) for name, folder in checkpoints.items()
    }
    requests["dense/bfloat16"] = Request(checkpoints["dense/packed"], prompts, engine={"dtype": "bfloat16"})
    return dict(zip(requests, ask_all(list(requests.values())), strict=True))


def _difference(reference: Answers, other: Answers, what: str) -> float:
    """The greatest of log-probabilities, in nats."""
    pairs = zip(reference.logprobs, other.logprobs, strict=True)
    found = max(float(np.abs(one - another).max()) for one, another in pairs)
    print(f"{what}: {found:.2g}, {divergence(reference, other)}")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_served_as_the_decoded_weights_say(answers: dict[str, Answers], kind: str) -> None:
    decoded, packed = answers[f"{kind}/decoded"], answers[f"{kind}/packed"]
    assert _difference(decoded, packed, kind) <= EXL3_SERVED
    assert packed.tokens == decoded.tokens
    assert packed.texts == decoded.texts and len(packed.texts) == 1


def test_corrupted_vectors_of_signs_break_the_bounds(answers: dict[str, Answers]) -> None:
    found = _difference(answers["moe/decoded"], answers["moe/corrupted"], "corrupted")
    assert found > EXL3_SERVED_BF16 > EXL3_SERVED


def test_bfloat16_differs_little(answers: dict[str, Answers]) -> None:
    assert (
        EXL3_SERVED < _difference(answers["dense/decoded"], answers["dense/bfloat16"], "bfloat16") <= EXL3_SERVED_BF16
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_stay_packed_in_memory(answers: dict[str, Answers], checkpoints: dict[str, Path], kind: str) -> None:
    """To the byte: trellises int16, signs float16, nothing else in these; keys that are values are held once."""
    held, packed = answers[f"{kind}/packed"].parameter_bytes, exl3.packed_bytes(checkpoints[f"{kind}/packed"])
    assert not {"int16", "float16"} & set(answers[f"{kind}/decoded"].parameter_bytes)
    assert held["int16"] + held["float16"] == packed
    bits = 8 * packed / exl3.weights(checkpoints[f"{kind}/decoded"])
    print(f"{kind}: {held}, {bits:.2f} bits a weight")
    assert bits < BITS[kind]


def test_the_log_says_what_was_done(answers: dict[str, Answers]) -> None:
    log = answers["dense/packed"].log
    assert log.count("EXL3 on a CPU: weights stay packed") == 1 and DISAGREES not in log


@pytest.mark.parametrize("how", ["eager", "experts-compiled"])
def test_two_ranks_answer_alike(
    answers: dict[str, Answers], checkpoints: dict[str, Path], prompts: list[list[int]], how: str
) -> None:
    """Heads of 32, layers of 96 and experts of 64: ranks meet within blocks of 128. Then as `vllm serve` compiles."""
    if how == "eager":
        (together,) = ask_ranks([Request(checkpoints["moe/packed"], prompts, engine=FLOAT32)])
    else:
        served = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "enforce_eager": False}
        together = ask(Request(checkpoints["moe/packed"], prompts, engine=FLOAT32 | served))
    assert _difference(answers["moe/decoded"], together, f"two ranks, {how}") <= EXL3_SERVED
    assert together.tokens == answers["moe/packed"].tokens


def test_a_packed_tower_is_refused_before_anything_starts(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    for name, value in engine_environment().items():
        monkeypatch.setenv(name, value)
    folder = exl3.edit(checkpoints["dense/packed"], tmp_path / "tower", exl3.pack_tower)
    with pytest.raises(InputError, match=r"^tensor model\.vision_tower\S+: got .*, expected an unquantized tower"):
        EngineArgs(model=str(folder), enforce_eager=True, max_model_len=256).create_engine_config()


def test_a_storage_file_that_disagrees_is_a_warning(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    for name, value in engine_environment().items():
        monkeypatch.setenv(name, value)
    folder = exl3.edit(checkpoints["dense/packed"], tmp_path / "other", lambda tensors: tensors)
    storage = folder / "quantization_config.json"
    storage.write_text(storage.read_text().replace('"shape": [16, 64, 64]', '"shape": [16, 64, 48]'))
    EngineArgs(model=str(folder), enforce_eager=True, max_model_len=256).create_engine_config()
    assert f"{DISAGREES} on 1 tensors, e.g. lm_head.trellis" in caplog.text
