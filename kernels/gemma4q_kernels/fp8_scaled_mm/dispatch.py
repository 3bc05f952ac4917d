"""Which backend runs a multiplication: one ordered list, one chooser, every refusal kept with its reason."""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch

from gemma4q_kernels.fp8_scaled_mm.problem import Problem
from gemma4q_kernels.support import Support, triton_support

# Names that callers may request, with the module that implements each.
_MODULES = {"triton": "triton", "blocks": "cpu", "reference": "reference"}
BACKENDS = tuple(_MODULES)
# What "auto" tries, best first. Triton's interpreter is never chosen, only requested.
_AUTO = {"cpu": ("blocks",)}
_AUTO_OTHERWISE = ("triton", "blocks")


@dataclass(frozen=True)
class Choice:
    """The backend that runs, and what was tried before it: pairs of backend and reason."""

    name: str
    refusals: tuple[tuple[str, str], ...]


def backend_module(name: str) -> ModuleType:
    """The module of a backend. Importing Triton's is left until it is needed."""
    return import_module(f"gemma4q_kernels.fp8_scaled_mm.{_MODULES[name]}")


def _can_implement(name: str, problem: Problem) -> Support:
    if name == "triton":
        launchable = triton_support(problem.device)
        if not launchable:
            return launchable  # its module cannot even be imported without Triton
    support: Support = backend_module(name).can_implement(problem)
    return support


def choose(device: torch.device | str, m: int, n: int, k: int, dtype: torch.dtype, requested: str = "auto") -> Choice:
    """Backend for [m, k] E4M3 x [n, k] E4M3 -> [m, n] of `dtype` on `device`.

    Args:
        requested: "auto", or one of `BACKENDS`, which is then chosen or refused and never replaced.

    Raises:
        ValueError: unknown backend; no backend tried can run it (every refusal is listed).
    """
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(f"backend: got {requested!r}, expected 'auto' or one of {list(BACKENDS)}")
    problem = Problem(torch.device(device), m, n, k, dtype)
    names = _AUTO.get(problem.device.type, _AUTO_OTHERWISE) if requested == "auto" else (requested,)
    refusals: list[tuple[str, str]] = []
    for name in names:
        support = _can_implement(name, problem)
        if support:
            return Choice(name, tuple(refusals))
        refusals.append((name, support.reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
    raise ValueError(f"fp8_scaled_mm M={m} N={n} K={k} {dtype} on {device}: no backend can run it ({reasons})")
