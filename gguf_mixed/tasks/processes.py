"""Tasks in processes of this machine, each with its share of the cores.

Workers are new Pythons, not forks: a fork of a process whose libraries have threads may wait for ever for locks that
threads of the parent held. Nor do they import the program's main file again. They are in a session of their own, so
that Ctrl-C at the terminal is the caller's alone to deal with, and end when the caller does, by the pipe between them.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

from gguf_mixed.tasks.base import ATTEMPTS, Attempt, Ledger, Progress, Result, Task, TaskLost

THREADS = "OMP_NUM_THREADS"
_DEVICES = "CUDA_VISIBLE_DEVICES"
_MAIN = "import sys; sys.path[:] = {path!r}; from gguf_mixed.tasks.worker import main; main({descriptor})"


class Processes:
    """See `Executor`. A context manager; processes start when there are tasks for them, and stay for later ones.

    Args:
        count: at once.
        devices: GPUs as CUDA_VISIBLE_DEVICES names them, given to workers in turn; none: they see all.
    """

    def __init__(self, count: int, devices: Sequence[str] = ()):
        self._count, self._devices = count, devices
        self._idle: list[_Worker] = []
        self._busy: dict[Connection[Any, Any], _Worker] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end([*self._idle, *self._busy.values()])

    def run(
        self, function: Callable[[Task, Attempt], Result], tasks: Iterable[Task], progress: Progress
    ) -> Generator[tuple[int, Result], None, None]:
        coming = enumerate(tasks)
        again: deque[tuple[int, Any]] = deque()
        deaths: Counter[int] = Counter()
        ledger = Ledger(progress)
        try:
            while self._fill(coming, again, function):
                for worker in self._heard_from():
                    place = worker.place
                    try:
                        kind, value = worker.pipe.recv()
                    except (EOFError, OSError):
                        deaths[place] += 1
                        ledger.note(place, 0)
                        how = self._bury(worker)
                        if deaths[place] == ATTEMPTS:
                            raise TaskLost(f"{worker.task}: {ATTEMPTS} workers died over it, the last {how}") from None
                        again.append((place, worker.task))
                        continue
                    if kind == "done":
                        ledger.note(place, value)
                        continue
                    self._idle.append(self._busy.pop(worker.pipe))
                    yield place, value.get()
        finally:
            self._end(self._busy.values())

    def on_each_machine(self, function: Callable[[Task], Result], argument: Task) -> dict[str, Result]:
        return {}

    def _fill(
        self, coming: Iterator[tuple[int, Any]], again: deque[tuple[int, Any]], function: Callable[[Any, Attempt], Any]
    ) -> bool:
        """Give tasks to workers until all have one or there are none; whether any has."""
        while len(self._busy) < self._count:
            following = again.popleft() if again else next(coming, None)
            if following is None:
                break
            self._give(*following, function)
        return bool(self._busy)

    def _heard_from(self) -> "list[_Worker]":
        """Busy workers that have sent something, or died."""
        ready = set(wait(list(self._busy)))
        return [worker for pipe, worker in self._busy.items() if pipe in ready]

    def _give(self, place: int, task: Any, function: Callable[[Any, Attempt], Any]) -> None:
        worker = self._idle.pop() if self._idle else self._start()
        worker.place, worker.task = place, task
        self._busy[worker.pipe] = worker
        message = pickle.dumps((function, task), pickle.HIGHEST_PROTOCOL)
        # It may have died while it had nothing to do: its pipe says so, and the task goes to another.
        with contextlib.suppress(OSError):
            worker.pipe.send_bytes(message)

    def _start(self) -> "_Worker":
        taken = {worker.number for worker in self._busy.values()}
        number = next(free for free in range(self._count) if free not in taken)
        ours, theirs = Pipe()
        with theirs:
            code = _MAIN.format(path=sys.path, descriptor=theirs.fileno())
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # the caller's own output may be one JSON document
                env={**os.environ, **self._environment(number)},
                start_new_session=True,
            )
        return _Worker(number, process, ours)

    def _environment(self, number: int) -> dict[str, str]:
        share = max(1, cores() // self._count)
        return {
            THREADS: str(share),
            **({_DEVICES: self._devices[number % len(self._devices)]} if self._devices else {}),
        }

    def _bury(self, worker: "_Worker") -> str:
        """Take a dead worker away; how it died."""
        self._end([worker])
        code = worker.process.returncode
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    def _end(self, workers: Iterable["_Worker"]) -> None:
        """Returns when they are gone, so that nothing is written any more."""
        workers = list(workers)
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.wait()
            worker.pipe.close()
            self._busy.pop(worker.pipe, None)
            if worker in self._idle:
                self._idle.remove(worker)


@dataclass(eq=False)
class _Worker:
    """A process, and what it is doing."""

    number: int
    process: "subprocess.Popen[bytes]"
    pipe: "Connection[Any, Any]"
    place: int = -1
    task: Any = None


def cores() -> int:
    """What this process may use: what its owner says, or else what the system gives it."""
    said = os.environ.get(THREADS, "")
    if said.isdigit() and int(said):
        return int(said)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
