"""The backends of INT8 multiplication, [m, k] int8 x [n, k] int8 -> [m, n]; see `gemma4q_kernels.dispatch`."""

from gemma4q_kernels.dispatch import Choice, Dispatcher
from gemma4q_kernels.int8_scaled_mm.problem import Problem

__all__ = ["BACKENDS", "Choice", "backend_module", "choose"]

_MODULES = {"triton": "triton", "int_mm": "cpu", "reference": "reference"}
_DISPATCHER = Dispatcher("int8_scaled_mm", Problem, _MODULES, {"cpu": ("int_mm", "reference")}, tuple(_MODULES))
BACKENDS = _DISPATCHER.backends
backend_module = _DISPATCHER.module
choose = _DISPATCHER.choose
