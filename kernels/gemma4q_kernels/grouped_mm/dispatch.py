"""The backends of INT8 experts; see `gemma4q_kernels.dispatch`, whose M, N, K are tokens, intermediate, hidden."""

from gemma4q_kernels.dispatch import Choice, Dispatcher
from gemma4q_kernels.grouped_mm.problem import Problem

__all__ = ["BACKENDS", "Choice", "backend_module", "choose"]

_MODULES = {"triton": "triton", "loop": "cpu"}
_DISPATCHER = Dispatcher("grouped_mm", Problem, _MODULES, {"cpu": ("loop",)}, tuple(_MODULES))
BACKENDS = _DISPATCHER.backends
backend_module = _DISPATCHER.module
choose = _DISPATCHER.choose
