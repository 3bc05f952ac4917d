"""The doctor's verdicts against what vLLM 0.32 on a CPU really does with the same checkpoints, plugin or not.

Engines follow each other in one process, with the plugin and without: only those of the tests that were selected. What
fails has to fail; what is called silently wrong has to come up and answer otherwise than the original; all else has to
answer like it.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_forks
import numpy as np
import pytest
from doctor import matrix_process
from doctor.broken_checkpoints import BROKEN, PLUGIN, SMALL, STOCK, base_of, write_broken
from tolerances import DOCTOR_RIGHT
from vllm_plugin.engine import Request, _to_json, engine_environment

from vllm_gemma4q.doctor.diagnose import Diagnosis, Verdict, diagnose
from vllm_gemma4q.doctor.engines import Device, parse_engine
from vllm_gemma4q.doctor.subject import open_subject

pytestmark = [pytest.mark.engine, pytest.mark.slow]

GOOD = ("bf16-dense", "bf16-moe", "int8-dense", "int8-moe", "int8-text", "int8-fused", "int8-sharded",
        "compressed-tower", "fp8-dense", "fp8-moe", "fp8-channels", "exl3-dense", "exl3-moe")  # fmt: skip
# Warnings of what the engine computes wrong; others are of memory, float16's range or chats.
SILENT = {"missing-scale", "fused-disagree", "list-misses", "missing-tensor", "missing-shard", "shape-mismatch"}
UNLOADED = {"bf16-no-values", "bf16-no-norm", "bf16-no-scalar"}
TIMEOUT_SECONDS = 1800
Result = np.ndarray | str  # log-probabilities, or what the engine died of
CASES = [(name, engine) for engine in (PLUGIN, STOCK) for name in (*GOOD, *BROKEN)]


def reference(name: str) -> str:
    """The sound checkpoint that has to answer alike."""
    start = BROKEN[name].good if name in BROKEN else name
    if start.startswith("exl3"):
        return f"dense-of-{start}"
    return "bf16-moe" if base_of(start).name == "moe" else "bf16-dense"


@pytest.fixture(scope="module")
def folders(
    request: pytest.FixtureRequest, good: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """Of the selected tests and of what they are compared with, by name and engine."""
    target, chosen = tmp_path_factory.mktemp("broken"), {}
    broken: dict[str, Path] = {}
    for item in request.session.items:
        if item.parent is request.node and hasattr(item, "callspec"):
            name, engine = item.callspec.params["name"], item.callspec.params["engine"]
            if name in BROKEN and name not in broken:
                broken[name] = write_broken(name, good, target)
            chosen[name, engine] = broken.get(name) or good[name]
            chosen[reference(name), PLUGIN] = good[reference(name)]
    return chosen


@pytest.fixture(scope="module")
def answers(
    folders: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Result]:
    """What each engine said or died of."""
    prompt, place = _prompt(), tmp_path_factory.mktemp("matrix")
    result = {}
    for number, asked in enumerate(_groups(list(folders))):
        requests = [_request(folders[key], key[0], prompt) for key in asked]
        found = _run(requests, place / str(number), {} if asked[0][1] == PLUGIN else {"VLLM_PLUGINS": ""})
        result |= dict(zip(asked, found, strict=True))
    return result


def _groups(keys: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """What can follow each other in one process.

    Tensors that nobody loads are what memory holds, which may be those of the engine before: these are alone. EXL3
    brings in numba, and stays apart.
    """
    for engine in (PLUGIN, STOCK):
        asked = [key for key in keys if key[1] == engine]
        alone = [key for key in asked if key[0] in UNLOADED]
        exl3 = [key for key in asked if engine == PLUGIN and key[0].startswith("exl3")]
        together = [key for key in asked if key not in alone and key not in exl3]
        yield from (group for group in (together, exl3) if group)
        yield from ([key] for key in alone)


def _request(folder: Path, name: str, prompt: list[int]) -> dict[str, Any]:
    # vLLM fills its cache with zeros: a gigabyte for each engine, of which one prompt needs little.
    settings: dict[str, Any] = {"distributed_executor_backend": "uni", "num_gpu_blocks_override": 64}
    if name == "int8-text":
        settings["limit_mm_per_prompt"] = None
    return _to_json(Request(folder, [prompt], max_tokens=1, engine=settings), {})


def _prompt() -> list[int]:
    from transformers import AutoTokenizer

    sys.path.insert(0, str(SMALL.parent))
    from small_gemma4 import corpus

    ids = AutoTokenizer.from_pretrained(SMALL / "dense")(corpus.training_sections()[7]).input_ids
    return list(ids[:128])


def _run(requests: list[dict[str, Any]], place: Path, plugins: dict[str, str]) -> list[Result]:
    """All requests; where one ends the whole process, the others go on in a new one."""
    results: list[Result] = []
    while len(results) < len(requests):
        results += _run_one_process(requests[len(results) :], place / str(len(results)), plugins)
    return results


def _run_one_process(requests: list[dict[str, Any]], place: Path, plugins: dict[str, str]) -> list[Result]:
    """Results up to the last request, or to the one that ended the process."""
    place.mkdir(parents=True)
    (place / "requests.json").write_text(json.dumps(requests))
    env = engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | plugins
    (code,) = engine_forks.run(matrix_process.main, [engine_forks.Call([place], env, place / "log")], TIMEOUT_SECONDS)
    results: list[Result] = []
    for number in range(len(requests)):
        logprobs, died = place / f"{number}.npy", place / f"{number}.txt"
        if not logprobs.exists() and not died.exists():
            return [*results, f"the process ended with code {code}"]
        results.append(died.read_text() if died.exists() else np.load(logprobs))
    return results


def expected(diagnosis: Diagnosis) -> str:
    """What the engine has to do."""
    if diagnosis.verdict is Verdict.FAILS:
        return "fails"
    wrong = {finding.code for finding in diagnosis.findings if finding.severity == "warning"}
    return "wrong" if wrong & SILENT else "right"


def observed(answer: Result, original: np.ndarray) -> str:
    """What it did."""
    if isinstance(answer, str):
        return "fails"
    if not np.isfinite(answer).all():
        return "wrong"
    p, q = original.astype(float), answer.astype(float)
    return "right" if (np.exp(p) * (p - q)).sum(axis=1).mean() < DOCTOR_RIGHT else "wrong"


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_the_verdict_is_what_happens(
    name: str,
    engine: str,
    folders: dict[tuple[str, str], Path],
    answers: dict[tuple[str, str], Result],
) -> None:
    original = answers[reference(name), PLUGIN]
    assert not isinstance(original, str), original
    diagnosis = diagnose(open_subject(folders[name, engine], None), parse_engine(engine, Device.CPU))
    answer = answers[name, engine]
    findings = [(finding.code, finding.severity.value) for finding in diagnosis.findings]
    assert observed(answer, original) == expected(diagnosis), (answer, findings)
