"""What one transformers makes of the small models: token ids, and the statistics of `gemma4q calibrate`."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from engine_answers import MODELS
from safetensors.numpy import load_file

# Relative to the largest value of a statistic: other versions may add in another order, in bfloat16.
SAME = 0.02
TOKENS = """
import json, sys
from pathlib import Path
from vllm_gemma4q.calibration.texts import load_tokenizer
tokenizer = load_tokenizer(Path(sys.argv[1]))
texts = json.loads(Path(sys.argv[2]).read_text())
chat = [{"role": "user", "content": texts[0][:200]}]
framed = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
print(json.dumps([tokenizer(text).input_ids for text in texts] + [list(framed)]))
"""


@dataclass(frozen=True)
class Read:
    """One version's answers; `error` is the last line of the command that failed."""

    tokens: list[list[int]]
    statistics: Mapping[str, Mapping[str, np.ndarray]]
    error: str | None = None


@dataclass(frozen=True)
class Judged:
    """Beside the locked version: whether token ids are the same, and the greatest deviation of a statistic."""

    verdict: str
    same_tokens: bool | None = None
    deviation: float | None = None
    error: str | None = None


def read(python: Path, texts: list[str], work: Path) -> Read:
    """Tokenize and calibrate with the transformers beside `python`."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "texts.json").write_text(json.dumps(texts))
    (work / "calibration.txt").write_text("\n\n".join(texts), encoding="utf-8")
    try:
        tokens = json.loads(_run(python, "-c", TOKENS, MODELS / "dense", work / "texts.json"))
        statistics = {kind: _calibrate(python, kind, work) for kind in ("dense", "moe")}
    except subprocess.CalledProcessError as error:
        return Read([], {}, (error.stderr.strip().splitlines() or ["no output"])[-1][:300])
    return Read(tokens, statistics)


def _calibrate(python: Path, kind: str, work: Path) -> Mapping[str, np.ndarray]:
    target = work / f"{kind}.safetensors"
    target.unlink(missing_ok=True)
    size = ("--text", work / "calibration.txt", "--samples", 8, "--max-length", 128)
    _run(python.with_name("gemma4q"), "calibrate", MODELS / kind, target, *size)
    arrays: Mapping[str, np.ndarray] = load_file(target)
    return arrays


def _run(*command: object) -> str:
    command = tuple(map(str, command))
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def judge(reference: Read, got: Read) -> Judged:
    """One version beside the locked one."""
    if got.error is not None:
        return Judged("fails", error=got.error)
    same_tokens = got.tokens == reference.tokens
    deviation = max(_deviation(reference.statistics[kind], got.statistics[kind]) for kind in reference.statistics)
    return Judged("equal" if same_tokens and deviation <= SAME else "differs", same_tokens, round(deviation, 6))


def _deviation(reference: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]) -> float:
    if reference.keys() != got.keys():
        return float("inf")
    worst = 0.0
    for name, expected in reference.items():
        largest = float(np.abs(expected.astype(np.float64)).max(initial=0.0))
        difference = float(np.abs(got[name].astype(np.float64) - expected.astype(np.float64)).max(initial=0.0))
        worst = max(worst, difference / largest if largest else difference)
    return worst
