"""Tasks on a Ray cluster. Ray places them, and does them again where a worker or its machine dies.

The caller runs on a machine of the cluster, which must stay; others may come and go. Every machine needs this package
in the same version, and must see under the same paths what tasks read and write. Ray's statistics, dashboard and logs
are off.
"""

import contextlib
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import Any, Self

from gguf_mixed.errors import InputError
from gguf_mixed.tasks.base import ATTEMPTS, Attempt, Ledger, Outcome, Progress, Result, Task, TaskLost, attempt

AUTO, LOCAL = "auto", "local"
_CONNECT_SECONDS = 5
_ANSWER_SECONDS = 120
_LONELY_SECONDS = 60
_POLL_SECONDS = 0.5
_WAITING_PER_SLOT = 2
# Ray reads these when it is imported: nothing is reported to its makers, and no warning of theirs is the user's.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class OnRay:
    """See `Executor`. A context manager.

    Args:
        address: "auto" finds the cluster of this machine, or else starts one on it; "local" starts one; or HOST:PORT.
        per_machine: tasks at once on each machine, which share its cores; None: one for each core.
        gpu: each task has one, and so they limit how many there are at once.

    Raises:
        InputError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, address: str, per_machine: int | None, gpu: bool = False):
        self._address, self._per_machine, self._gpu = address, per_machine, gpu

    def __enter__(self) -> Self:
        os.environ.update({name: os.environ.get(name, value) for name, value in _QUIET.items()})
        try:
            import ray
        except ImportError as error:
            raise InputError("--ray: Ray is not installed: pip install 'vllm-gemma4q[ray]'") from error
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        if self._address not in (AUTO, LOCAL):
            _require_answer(self._address)
        try:
            self._connect(ray)
        except Exception as error:
            # Of many kinds, as Ray's own documentation has it, and of many lines.
            raise InputError(f"--ray {self._address}: cannot be used: {' '.join(str(error).split())[:300]}") from error
        self._ray: Any = ray
        self._here = ray.get_runtime_context().get_node_id()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ray.shutdown()

    def _connect(self, ray: Any) -> None:
        settings: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if self._address != LOCAL:
            try:
                ray.init(self._address, **settings)
                return
            except ConnectionError:
                if self._address != AUTO:
                    raise
        ray.init(LOCAL, include_dashboard=False, **settings)

    def run(
        self, function: Callable[[Task, Attempt], Result], tasks: Iterable[Task], progress: Progress
    ) -> Generator[tuple[int, Result], None, None]:
        ray, ledger, coming = self._ray, Ledger(progress), enumerate(tasks)
        counter = ray.remote(num_cpus=0, scheduling_strategy=self._on(self._here))(_Counter).remote()
        needed = self._needed()
        remote = ray.remote(max_retries=ATTEMPTS - 1, **needed)(_carry_out)
        running: dict[Any, tuple[int, Any]] = {}
        alone_since: float | None = None
        try:
            while True:
                # More may be running than there are slots now: machines leave.
                free = max(0, self._slots(needed) * _WAITING_PER_SLOT - len(running))
                for place, task in itertools.islice(coming, free):
                    running[remote.remote(function, task, place, counter)] = place, task
                if not running:
                    return
                ready, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
                for place, done in ray.get(counter.latest.remote()).items():
                    ledger.note(place, done)
                for reference in ready:
                    place, task = running.pop(reference)
                    yield place, self._outcome(reference, task).get()
                alone_since = None if ready or self._slots(needed) else alone_since or time.monotonic()
                if alone_since is not None and time.monotonic() - alone_since > _LONELY_SECONDS:
                    raise TaskLost(f"--ray {self._address}: no machine is left that has {_described(needed)}")
        finally:
            self._cancel(running)
            ray.kill(counter)

    def on_each_machine(self, function: Callable[[Task], Result], argument: Task) -> dict[str, Result]:
        ray, found = self._ray, {}
        asked = {
            node["NodeManagerAddress"] + f" ({node['NodeID'][:8]})": ray.remote(
                num_cpus=0, max_retries=0, scheduling_strategy=self._on(node["NodeID"])
            )(_plainly).remote(function, argument)
            for node in self._alive()
            if node["NodeID"] != self._here
        }
        for machine, reference in asked.items():
            try:
                found[machine] = ray.get(reference, timeout=_ANSWER_SECONDS).get()
            except ray.exceptions.RayError as error:
                raise TaskLost(f"machine {machine}: {_last_line(error)}; expected this package there") from error
        return found

    def _outcome(self, reference: Any, task: Any) -> Outcome:
        try:
            outcome: Outcome = self._ray.get(reference)
            return outcome
        except self._ray.exceptions.RayTaskError as error:
            raise TaskLost(f"{task}: no worker can carry it out: {_last_line(error)}") from error
        except self._ray.exceptions.RayError as error:
            raise TaskLost(f"{task}: {ATTEMPTS} workers died over it, the last: {_last_line(error)}") from error

    def _needed(self) -> dict[str, int]:
        """Cores and GPUs of one task: the smallest machine takes as many as were asked for."""
        cores = [int(node["Resources"]["CPU"]) for node in self._alive() if node["Resources"].get("CPU", 0) >= 1]
        gpus = [int(node["Resources"].get("GPU", 0)) for node in self._alive()]
        if not cores or (self._gpu and not any(gpus)):
            raise TaskLost(f"--ray {self._address}: no machine offers {'a GPU' if self._gpu else 'a core'}")
        at_once = min(cores) if self._per_machine is None else self._per_machine
        if self._gpu:
            return {"num_cpus": max(1, min(cores) // max(gpus)), "num_gpus": 1}
        return {"num_cpus": -(-min(cores) // at_once)}  # rounded up: never more at once, which memory may not hold

    def _slots(self, needed: dict[str, int]) -> int:
        """Tasks that the machines of now carry out at once."""
        names = {"num_cpus": "CPU", "num_gpus": "GPU"}
        return sum(
            min(int(node["Resources"].get(names[name], 0)) // count for name, count in needed.items())
            for node in self._alive()
        )

    def _alive(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _on(self, node: str) -> Any:
        return self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)

    def _cancel(self, running: Iterable[Any]) -> None:
        """Returns when they are gone, so that nothing is written any more."""
        references = list(running)
        for reference in references:
            with contextlib.suppress(Exception):
                self._ray.cancel(reference, force=True)
        if references:
            self._ray.wait(references, num_returns=len(references), timeout=_CONNECT_SECONDS)


class _Counter:
    """Of what attempts have done so far; lives on the caller's machine."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}

    def note(self, place: int, done: int) -> None:
        self._done[place] = done

    def latest(self) -> dict[int, int]:
        """What has changed since the last call."""
        changed, self._done = self._done, {}
        return changed


def _carry_out(function: Callable[[Any, Attempt], Any], task: Any, place: int, counter: Any) -> Outcome:
    counter.note.remote(place, 0)
    return attempt(function, task, lambda done: counter.note.remote(place, done))


def _plainly(function: Callable[[Any], Any], argument: Any) -> Outcome:
    return attempt(lambda task, _: function(task), argument, lambda done: None)


def _require_answer(address: str) -> None:
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise InputError(f"--ray {address}: expected {AUTO}, {LOCAL} or HOST:PORT of the cluster's head")
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--ray {address}: no cluster answers there: {error}") from error


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _described(needed: dict[str, int]) -> str:
    return " and ".join(f"{count} {name.removeprefix('num_')}" for name, count in needed.items())
