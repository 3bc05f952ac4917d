"""The backends of EXL3, [m, k] x packed [k, n] -> [m, n]; see `gemma4q_kernels.dispatch`."""

from gemma4q_kernels.dispatch import Choice, Dispatcher
from gemma4q_kernels.exl3.format import Problem

__all__ = ["AUTO", "BACKENDS", "Choice", "backend_module", "choose"]

AUTO = {"cuda": ("triton", "blocks")}
_MODULES = {"triton": "triton", "blocks": "cpu", "reference": "reference"}
_DISPATCHER = Dispatcher("exl3", Problem, _MODULES, AUTO, ("blocks",))
BACKENDS = _DISPATCHER.backends
backend_module = _DISPATCHER.module
choose = _DISPATCHER.choose
