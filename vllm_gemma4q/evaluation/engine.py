"""Score text with vLLM: the checkpoint as it would be served, one window after the other.

vLLM runs in a process of its own, which ends with the measurement and gives all memory back.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.server import CPU_ENVIRONMENT, last_error
from vllm_gemma4q.evaluation.windows import Window

_RECORDER = "vllm_gemma4q.evaluation.recorder.Recorder"


@dataclass(frozen=True)
class Scores:
    """What a model said to the windows.

    Attributes:
        logprobs: float32 [predicted tokens], of the text's own tokens, natural logarithms.
        vocabulary: of the recorded distributions, 0 where none were.
        seconds: of scoring, without the start of the engine.
    """

    logprobs: npt.NDArray[np.float32]
    vocabulary: int
    seconds: float


def score(
    model: Path, windows: Sequence[Window], log: Path, distributions: Path | None = None, **engine: Any
) -> Scores:
    """Start vLLM on a checkpoint and score windows.

    Args:
        log: receives what the engine prints, behind what is there.
        distributions: file for the log-probabilities of the whole vocabulary, see `distributions.py`.
        engine: more arguments of `vllm.LLM`, such as `tensor_parallel_size`.

    Raises:
        InputError: vLLM is not installed, or died; the message is its last error and names the log.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError("vllm: not installed, expected vLLM 0.32 or newer")
    request = {
        "engine": _engine(model, windows, engine),
        "windows": [[list(window.tokens), window.first, window.last] for window in windows],
        "distributions": None if distributions is None else str(distributions.resolve()),
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "answer.npz")
        asked.write_text(json.dumps(request))
        command = [sys.executable, "-m", "vllm_gemma4q.evaluation.score_process", str(asked), str(answered)]
        with log.open("ab") as output:
            done = subprocess.run(
                command,
                env={**CPU_ENVIRONMENT, **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode or not answered.exists():
            raise InputError(f"{model}: vLLM ended with code {done.returncode}; last error: {last_error(log)}")
        answer = np.load(answered)
        return Scores(answer["logprobs"], int(answer["vocabulary"]), float(answer["seconds"]))


def engine_facts() -> dict[str, str]:
    """The engine's name and version, for results."""
    return {"name": "vllm", "version": metadata.version("vllm")}


def _engine(model: Path, windows: Sequence[Window], given: Mapping[str, Any]) -> dict[str, Any]:
    """One window at a time and never in parts: `Recorder` counts on both."""
    length = 1 + max(len(window.tokens) for window in windows)
    return {
        "model": str(model.resolve()),
        "max_model_len": length,
        "max_num_batched_tokens": max(length, 2048),
        "max_num_seqs": 1,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0},
        **given,
        "worker_extension_cls": _RECORDER,
    }
