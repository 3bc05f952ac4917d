"""Functions in forks of a process that has imported vLLM, which takes ten seconds: a small engine itself takes five.

For engines that are asked in Python. The commands that users type start Pythons of their own in tests, too.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "compressed_tensors",
        "vllm.entrypoints.llm",
        "vllm.model_executor.models.gemma4_mm",
        "vllm.v1.engine.llm_engine",
        "vllm.v1.worker.cpu_worker",
    ]
)


@dataclass(frozen=True)
class Call:
    """One process.

    Attributes:
        arguments: of the function.
        environment: all of it.
        log: file for what is printed; its folder is where the process runs.
    """

    arguments: Sequence[object]
    environment: dict[str, str]
    log: Path


def run(function: Callable[..., None], calls: Sequence[Call], timeout_seconds: float) -> list[int]:
    """Call a function of a module in processes side by side; where one fails, the others are killed.

    Returns:
        Their exit codes.

    Raises:
        TimeoutError: they took longer.
    """
    processes = [_FORKS.Process(target=_called, args=(function, call)) for call in calls]
    with mock.patch.dict(os.environ, calls[0].environment):  # in which vLLM is imported, the first time
        for process in processes:
            process.start()
    try:
        _wait(processes, timeout_seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in processes]


def _wait(processes: Sequence[BaseProcess], timeout_seconds: float) -> None:
    """Until all have ended, or one of them badly: the others would wait for it."""
    deadline = time.monotonic() + timeout_seconds
    while any(process.exitcode is None for process in processes) and not any(process.exitcode for process in processes):
        if time.monotonic() > deadline:
            raise TimeoutError(f"engine: not done after {timeout_seconds} s")
        time.sleep(0.05)


def _called(function: Callable[..., None], call: Call) -> None:
    os.environ.clear()
    os.environ.update(call.environment)
    os.chdir(call.log.parent)
    log = os.open(call.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    function(*call.arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what engines leave behind would take seconds to be taken apart
