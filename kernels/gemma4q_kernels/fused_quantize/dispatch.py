"""The backends of the fused steps, [m, n] float -> [m, k] int8; see `gemma4q_kernels.dispatch`."""

from gemma4q_kernels.dispatch import Choice, Dispatcher
from gemma4q_kernels.fused_quantize.problem import Problem

__all__ = ["BACKENDS", "Choice", "backend_module", "choose"]

_MODULES = {"triton": "triton", "reference": "reference"}
_DISPATCHER = Dispatcher("fused_quantize", Problem, _MODULES, {"cpu": ("reference",)}, tuple(_MODULES))
BACKENDS = _DISPATCHER.backends
backend_module = _DISPATCHER.module
choose = _DISPATCHER.choose
