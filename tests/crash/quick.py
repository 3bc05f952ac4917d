"""What takes a run seconds and writes none of its files, done in milliseconds: for the runs of fork_server.py.

- Searching trellises: a tile's path is made of its weights' bits, so that other weights are other bytes.
- vLLM: stub_engine.py, whose figures follow from the model's name and the windows.
- Starting workers: forks instead of new Pythons, which import torch for 3 seconds each. All else about them is the
  same: a session of their own, a pipe that ends them, no other file of their caller's.

The real ones are killed in tests/exl3, test_engine_killed.py and `test_real_workers_killed_and_run_again`.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch


def patch() -> None:
    from gemma4q_kernels.exl3 import viterbi_cpu

    from gguf_mixed.tasks import processes
    from vllm_gemma4q.evaluation.engines import vllm

    viterbi_cpu.search = _search
    vllm._PROCESS = "stub_engine"
    processes.subprocess = _Forking  # type: ignore[attr-defined]


def _search(tiles: torch.Tensor, width: int, codebook: str) -> torch.Tensor:
    from gemma4q_kernels.exl3.reference import states

    return states(tiles[:, :width].contiguous().view(torch.int32).to(torch.int16))


class _Forking:
    """What `gguf_mixed.tasks.processes` takes from subprocess."""

    DEVNULL = -3

    class Popen:
        """A worker. Its caller has one thread when it starts workers, or a fork might wait for locks for ever."""

        def __init__(self, command: Sequence[str], pass_fds: Sequence[int], env: dict[str, str], **options: Any):
            assert options == {"stdin": _Forking.DEVNULL, "stdout": 2, "start_new_session": True}
            self.returncode: int | None = None
            self.pid = os.fork()
            if not self.pid:
                try:
                    _become_worker(*pass_fds, env)
                finally:
                    os._exit(1)

        def kill(self) -> None:
            if self.poll() is None:
                os.kill(self.pid, 9)

        def wait(self) -> int:
            if self.returncode is None:
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            return self.returncode

        def poll(self) -> int | None:
            if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
                self.returncode = os.waitstatus_to_exitcode(found[1])
            return self.returncode


def _become_worker(pipe: int, environment: dict[str, str]) -> None:
    from gguf_mixed.tasks.worker import main

    os.setsid()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    os.closerange(3, pipe)
    os.closerange(pipe + 1, os.sysconf("SC_OPEN_MAX"))
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    main(pipe)
