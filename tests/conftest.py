"""Shared fixtures. Folders beside the repository are used when they are there; no test needs them to pass."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

# Side by side, tests and what they start get a core each: two threads of torch that wait for one are ten times slower.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# Shells start background jobs with Ctrl-C ignored, and programs that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def gemma4q() -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit code, stdout, stderr."""
    import in_process

    return in_process.gemma4q


@pytest.fixture(scope="module")
def few_vllm_processes() -> Iterator[None]:
    """vLLM's engine core and worker are one process: each imports vLLM for ten seconds, and the first spins while the
    second works. `vllm_plugin.engine.ask` and the tests of servers start them as users have them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@pytest.fixture(autouse=True)
def the_same_numbers_every_time() -> None:
    """Numbers that a test draws from torch's own generator are the same in every run, whichever tests ran before."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)
