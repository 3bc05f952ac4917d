"""Ask a real vLLM engine on this machine's CPU, in a process of its own.

`ask` starts vLLM on a checkpoint folder and returns full-vocabulary log-probabilities of prompts, greedy
continuations and answers about pictures; a start costs 20 to 35 s, so callers keep what they get.
`divergence` compares two engines' log-probabilities.
"""

import base64
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROCESS = Path(__file__).with_name("engine_process.py")
TIMEOUT_SECONDS = 300


class EngineError(Exception):
    """The engine did not start or died; the message is everything it printed."""


@dataclass(frozen=True)
class Answers:
    """What an engine said.

    Attributes:
        logprobs: float32 [T - 1, V] a prompt of T tokens: position t scores token t + 1.
        tokens: greedy continuation of each prompt.
        texts: answers about the pictures.
        log: everything the engine printed.
    """

    logprobs: tuple[np.ndarray, ...]
    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    log: str


def ask(
    model: Path | str,
    prompts: Sequence[Sequence[int]] = (),
    *,
    pictures: Sequence[tuple[Any, str]] = (),
    max_tokens: int = 8,
    env: dict[str, str] | None = None,
    **engine: Any,
) -> Answers:
    """Start vLLM on `model`, ask everything at once, stop it.

    Args:
        prompts: token ids.
        pictures: (PIL image, question) pairs.
        env: environment variables on top of those that a small CPU engine needs.
        engine: arguments of `vllm.LLM`.

    Raises:
        EngineError: it did not come up or died.
    """
    settings = {
        "model": str(model),
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "max_logprobs": -1,
        "enable_prefix_caching": False,
        "limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0},
        **engine,
    }
    request = {
        "engine": settings,
        "prompts": [list(prompt) for prompt in prompts],
        "pictures": [(_data_url(image), question) for image, question in pictures],
        "max_tokens": max_tokens,
    }
    with tempfile.TemporaryDirectory() as folder:
        request_path, answers_path = Path(folder, "request.json"), Path(folder, "answers.npz")
        request_path.write_text(json.dumps(request))
        command = [sys.executable, str(PROCESS), str(request_path), str(answers_path)]
        environment = _environment(settings.get("tensor_parallel_size", 1)) | (env or {})
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
        log = done.stdout + done.stderr
        if done.returncode != 0:
            raise EngineError(log)
        arrays = np.load(answers_path)
        count = range(len(prompts))
        return Answers(
            tuple(arrays[f"logprobs_{index}"] for index in count),
            tuple(tuple(arrays[f"tokens_{index}"].tolist()) for index in count),
            tuple(arrays["texts"].tolist()),
            log,
        )


def _environment(tensor_parallel_size: int) -> dict[str, str]:
    threads = "|".join(str(rank) for rank in range(tensor_parallel_size)) if tensor_parallel_size > 1 else "auto"
    return os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": threads if (os.cpu_count() or 1) >= tensor_parallel_size else "nobind",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }


def _data_url(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Divergence:
    """How far one engine's next-token distributions are from a reference's.

    Attributes:
        mean_kld: mean over positions of KL(reference || other), in nats.
        same_top: share of positions whose most likely token is the same.
        positions: how many were compared.
    """

    mean_kld: float
    same_top: float
    positions: int


def divergence(reference: Answers, other: Answers) -> Divergence:
    """Compare two engines over the same prompts."""
    klds, same = [], []
    for p, q in zip(reference.logprobs, other.logprobs, strict=True):
        if not np.isfinite(q).any(axis=1).all():
            return Divergence(float("inf"), 0.0, 0)
        probability = np.exp(p.astype(np.float64))
        with np.errstate(invalid="ignore"):
            terms = np.where(probability > 0, probability * (p.astype(np.float64) - q), 0.0)
        klds.append(terms.sum(axis=1))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
    return Divergence(float(np.concatenate(klds).mean()), float(np.concatenate(same).mean()), sum(map(len, same)))
