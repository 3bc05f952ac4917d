"""Seconds a call. On a GPU calls are captured in a CUDA graph and replayed, so that launching costs what it costs in an
engine; on a CPU they are timed one by one.

Several calls of one kind, each with a weight of its own, are taken in turn: together the weights exceed the caches, as
a model's do. `copies_beyond_cache` says how many that takes.
"""

# mypy: disable-error-code="no-untyped-call"
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

Call = Callable[[], object]

_REPLAYS = 10
_INFINITY_CACHE = 96 << 20  # of a 7900 XTX, behind its L2; HIP does not report it
_CPU_CACHE = 32 << 20  # where the system does not tell the size of the last level
_MOST_COPIES = 64


def cache_bytes(device: torch.device) -> int:
    """Size of the last level cache that calls share."""
    if device.type == "cuda":
        reported = int(torch.cuda.get_device_properties(device).L2_cache_size)
        return max(reported, _INFINITY_CACHE) if torch.version.hip else reported
    try:
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), _CPU_CACHE)
    except (ValueError, OSError, AttributeError):
        return _CPU_CACHE


def copies_beyond_cache(n_bytes: int, device: torch.device) -> int:
    """Weights of `n_bytes` to take in turn until each has left the cache when its turn comes again."""
    return min(_MOST_COPIES, 1 + math.ceil(2 * cache_bytes(device) / max(n_bytes, 1)))


def time_calls(calls: Sequence[Call], device: torch.device, budget: float) -> list[float]:
    """Times of calls taken in turn, in seconds: at least three, and on a CPU until `budget` seconds are spent.

    On a GPU each is the mean over one replay of a graph; `budget` is what all replays take together.
    """
    return _on_gpu(calls, budget) if device.type == "cuda" else _on_cpu(calls, budget)


def _on_cpu(calls: Sequence[Call], budget: float) -> list[float]:
    times: list[float] = []
    calls[0]()
    started = time.perf_counter()
    for call in itertools.cycle(calls):
        before = time.perf_counter()
        call()
        now = time.perf_counter()
        times.append(now - before)
        if len(times) >= 3 and now - started >= budget:
            return times
    raise ValueError("calls: got none, expected at least one")


def _on_gpu(calls: Sequence[Call], budget: float) -> list[float]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()  # compiles
        stream.synchronize()
        once = _elapsed(stream, partial(_run_each, calls)) / len(calls)
        n_calls = len(calls) * max(1, math.ceil(budget / _REPLAYS / max(once, 1e-6) / len(calls)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            _run_each(itertools.islice(itertools.cycle(calls), n_calls))
        graph.replay()
        return [_elapsed(stream, graph.replay) / n_calls for _ in range(_REPLAYS)]


def _run_each(calls: Iterable[Call]) -> None:
    """Run them, keeping no output: those of many calls may not fit memory."""
    for call in calls:
        call()


def _elapsed(stream: torch.cuda.Stream, work: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    work()
    end.record(stream)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
