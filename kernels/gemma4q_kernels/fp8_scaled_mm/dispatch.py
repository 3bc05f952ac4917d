"""The backends of FP8 multiplication, [m, k] E4M3 x [n, k] E4M3 -> [m, n]; see `gemma4q_kernels.dispatch`."""

from gemma4q_kernels.dispatch import Choice, Dispatcher
from gemma4q_kernels.fp8_scaled_mm.problem import Problem

__all__ = ["BACKENDS", "Choice", "backend_module", "choose"]

_MODULES = {"triton": "triton", "blocks": "cpu", "reference": "reference"}
_DISPATCHER = Dispatcher("fp8_scaled_mm", Problem, _MODULES, {"cpu": ("blocks",)}, ("triton", "blocks"))
BACKENDS = _DISPATCHER.backends
backend_module = _DISPATCHER.module
choose = _DISPATCHER.choose
