"""Which backend runs a multiplication: one ordered list, one chooser, every refusal kept with its reason.

An operation is a package `gemma4q_kernels.<operation>` whose backends are modules with `can_implement(problem)`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from gemma4q_kernels.support import Support, triton_support


@dataclass(frozen=True)
class Choice:
    """The backend that runs, and what was tried before it: pairs of backend and reason."""

    name: str
    refusals: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Dispatcher:
    """The backends of one operation.

    Attributes:
        operation: name of its package.
        problem: makes what `can_implement` gets of (device, M, N, K, output dtype).
        modules: names that callers may request, with the module that implements each.
        auto: what "auto" tries by type of device, best first. Triton's interpreter is never chosen, only requested.
        auto_otherwise: the same for all other devices.
    """

    operation: str
    problem: Callable[[torch.device, int, int, int, torch.dtype], Any]
    modules: Mapping[str, str]
    auto: Mapping[str, tuple[str, ...]]
    auto_otherwise: tuple[str, ...]

    @property
    def backends(self) -> tuple[str, ...]:
        """Names that callers may request."""
        return tuple(self.modules)

    def module(self, name: str) -> ModuleType:
        """The module of a backend. Importing Triton's is left until it is needed."""
        return import_module(f"gemma4q_kernels.{self.operation}.{self.modules[name]}")

    def choose(
        self, device: torch.device | str, m: int, n: int, k: int, dtype: torch.dtype, requested: str = "auto"
    ) -> Choice:
        """Backend for [m, k] x [n, k] -> [m, n] of `dtype` on `device`.

        Args:
            requested: "auto", or one of `backends`, which is then chosen or refused and never replaced.

        Raises:
            ValueError: unknown backend; no backend tried can run it (every refusal is listed).
        """
        if requested != "auto" and requested not in self.modules:
            raise ValueError(f"backend: got {requested!r}, expected 'auto' or one of {list(self.modules)}")
        problem = self.problem(torch.device(device), m, n, k, dtype)
        automatic = self.auto.get(torch.device(device).type, self.auto_otherwise)
        refusals: list[tuple[str, str]] = []
        for name in automatic if requested == "auto" else (requested,):
            support = self._can_implement(name, problem)
            if support:
                return Choice(name, tuple(refusals))
            refusals.append((name, support.reason))
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
        raise ValueError(f"{self.operation} M={m} N={n} K={k} {dtype} on {device}: no backend can run it ({reasons})")

    def _can_implement(self, name: str, problem: Any) -> Support:
        launchable = triton_support(problem.device) if name == "triton" else None
        if launchable is not None and not launchable:
            return launchable  # its module cannot even be imported without Triton
        support: Support = self.module(name).can_implement(problem)
        return support
