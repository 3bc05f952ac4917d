"""Where tasks are carried out, as options of commands say it."""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from gguf_mixed.errors import InputError
from gguf_mixed.tasks.base import Executor
from gguf_mixed.tasks.on_ray import OnRay
from gguf_mixed.tasks.processes import Processes


@dataclass(frozen=True)
class Where:
    """What `--workers` and `--ray` say.

    Attributes:
        workers: processes on this machine, or with `ray` tasks at once on each machine of the cluster.
        ray: the cluster's address, see `OnRay`; None: this machine.
        devices: GPUs of this machine that tasks compute on, as CUDA_VISIBLE_DEVICES names them; none: they do not.

    Raises:
        InputError: no workers.
    """

    workers: int | None = None
    ray: str | None = None
    devices: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers: got {self.workers}, expected 1 or more")

    @property
    def is_here(self) -> bool:
        """Whether this process does it all."""
        return self.ray is None and self.workers in (None, 1)


def executor(where: Where, by_core: bool = False) -> AbstractContextManager[Executor | None]:
    """None where this process does it all.

    Args:
        by_core: tasks use one core, so that without `--workers` a cluster carries out one for each of its cores.
    """
    if where.is_here:
        return contextlib.nullcontext()
    if where.ray is None:
        return Processes(where.workers or 1, where.devices)
    return OnRay(where.ray, where.workers if by_core else where.workers or 1, bool(where.devices))
