"""Ask real vLLM engines on this machine's CPU, in processes of their own.

`ask` starts vLLM on one checkpoint as `vllm serve` does, with an engine core and workers of their own: 20 to 40 s.
`ask_all` runs several checkpoints one after the other within one process, `ask_ranks` within one a rank, which takes
about 3 s each.
All return full-vocabulary log-probabilities of prompts, greedy continuations and answers about pictures.
`divergence` compares two engines' log-probabilities.
"""

import base64
import contextlib
import io
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import engine_forks
import numpy as np
from vllm_plugin import engine_process

TIMEOUT_SECONDS = 600
SECTION = "### engine "
# One process for front end, engine core and worker, so that several engines can follow each other in it.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class EngineError(Exception):
    """The engine did not start or died; the message is everything it printed."""


@dataclass(frozen=True)
class Request:
    """What to ask one engine.

    Attributes:
        model: checkpoint folder.
        prompts: token ids.
        pictures: (PIL image, question) pairs.
        max_tokens: length of the greedy continuation of each prompt.
        engine: arguments of `vllm.LLM`.
    """

    model: Path
    prompts: Sequence[Sequence[int]] = ()
    pictures: Sequence[tuple[Any, str]] = ()
    max_tokens: int = 16
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """What an engine said.

    Attributes:
        logprobs: float32 [T - 1, V] a prompt of T tokens: position t scores token t + 1.
        tokens: greedy continuation of each prompt, to the end of the turn or `max_tokens`.
        texts: answers about the pictures.
        log: everything printed from its start on, to the start of the next.
        parameter_bytes: of the loaded model, by dtype; empty where it lives in other processes.
    """

    logprobs: tuple[np.ndarray, ...] = field(repr=False)
    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    log: str = field(repr=False)
    parameter_bytes: dict[str, int] = field(default_factory=dict, repr=False)


def ask(request: Request) -> Answers:
    """Start vLLM in its usual processes and ask it.

    Raises:
        EngineError: it did not come up or died.
    """
    ranks = request.engine.get("tensor_parallel_size", 1)
    return _run([request], [engine_environment(ranks) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}], {})[0]


def ask_all(requests: Sequence[Request]) -> list[Answers]:
    """Start one engine after the other in a single process and ask each.

    Raises:
        EngineError: one of them did not come up or died.
    """
    return _run(requests, [engine_environment() | IN_PROCESS], {"distributed_executor_backend": "uni"})


def ask_ranks(requests: Sequence[Request], ranks: int = 2) -> list[Answers]:
    """Start one engine after the other, each over the same `ranks` processes, as torchrun does, and ask each.

    Raises:
        EngineError: one of them did not come up or died.
    """
    settings = {"tensor_parallel_size": ranks, "distributed_executor_backend": "external_launcher"}
    shared = engine_environment() | IN_PROCESS | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    ports = free_ports(len(requests))
    shared |= {"MASTER_PORTS": " ".join(map(str, ports)), "OMP_NUM_THREADS": "1"}
    environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    with removed_shared_memory(ports):
        return _run(requests, environments, settings)


def engine_environment(tensor_parallel_size: int = 1) -> dict[str, str]:
    """The environment in which small engines fit a small machine."""
    cores = os.cpu_count() or 1
    bind = "|".join(map(str, range(tensor_parallel_size))) if 1 < tensor_parallel_size <= cores else "nobind"
    return os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": bind,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, min(2, cores) // tensor_parallel_size))),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def free_ports(count: int) -> list[int]:
    """Different ones."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextlib.contextmanager
def removed_shared_memory(ports: Sequence[int]) -> Iterator[None]:
    """What ranks that met at these ports, and did not end as vLLM ends them, left in memory; gone after the block."""
    try:
        yield
    finally:
        for port in ports:
            for path in Path("/dev/shm").glob(f"{port}-*cpushm_*"):
                path.unlink()


def _run(requests: Sequence[Request], environments: Sequence[dict[str, str]], engine: dict[str, Any]) -> list[Answers]:
    """What the first of some processes answers, one an environment, all with the same requests."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "requests.json").write_text(json.dumps([_to_json(request, engine) for request in requests]))
        calls = [
            engine_forks.Call((folder / "requests.json", folder / f"{rank}.npz"), environment, folder / f"{rank}.log")
            for rank, environment in enumerate(environments)
        ]
        codes = engine_forks.run(engine_process.main, calls, TIMEOUT_SECONDS)
        printed = [call.log.read_text(errors="replace") for call in calls]
        if any(codes):
            raise EngineError("\n".join(printed))
        arrays = np.load(folder / "0.npz")
        logs = printed[0].split(SECTION)[1:]
        return [_answers(index, request, arrays, logs[index]) for index, request in enumerate(requests)]


def _to_json(request: Request, engine: dict[str, Any]) -> dict[str, Any]:
    settings = {
        "model": str(request.model),
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "max_logprobs": -1,
        "enable_prefix_caching": False,
        "num_gpu_blocks_override": 256,  # else a gigabyte of zeros an engine
        "limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0},
    }
    return {
        "engine": settings | engine | request.engine,
        "prompts": [list(prompt) for prompt in request.prompts],
        "pictures": [(_data_url(image), question) for image, question in request.pictures],
        "max_tokens": request.max_tokens,
    }


def _answers(index: int, request: Request, arrays: Any, log: str) -> Answers:
    prompts = range(len(request.prompts))
    return Answers(
        tuple(arrays[f"{index}/logprobs/{prompt}"] for prompt in prompts),
        tuple(tuple(arrays[f"{index}/tokens/{prompt}"].tolist()) for prompt in prompts),
        tuple(arrays[f"{index}/texts"].tolist()),
        log,
        json.loads(str(arrays[f"{index}/parameter_bytes"])),
    )


def _data_url(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Divergence:
    """How far one engine's next-token distributions are from a reference's.

    Attributes:
        mean_kld: mean over positions of KL(reference || other), in nats; infinite where the other is not finite.
        same_top: share of positions whose most likely token is the same.
        positions: how many were compared.
    """

    mean_kld: float
    same_top: float
    positions: int


def divergence(reference: Answers, other: Answers) -> Divergence:
    """Compare two engines over the same prompts."""
    p = np.concatenate(reference.logprobs).astype(np.float64)
    q = np.concatenate(other.logprobs).astype(np.float64)
    with np.errstate(invalid="ignore"):
        kld = np.where(p > -np.inf, np.exp(p) * (p - q), 0.0).sum(axis=1).mean()
    same_top = (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    return Divergence(float(kld) if np.isfinite(kld) else np.inf, float(same_top), len(p))
