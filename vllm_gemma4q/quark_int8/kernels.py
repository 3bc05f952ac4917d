"""Which INT8 kernels vLLM runs: on a GPU its own, or those of `gemma4q_kernels`; on a CPU its own, mended.

Ours (`gpu_linear`, `gpu_experts`) serve layers with a weight scale a channel and dynamic symmetric activation scales a
token. vLLM hears of them when the first layer of a claimed checkpoint is built, so other models, and processes that
load none, never do. `GEMMA4Q_INT8_KERNELS` says when they run:

    unset   where Triton was asked for: `--linear-backend triton`, `--moe-backend triton`. Then they come before vLLM's
            Triton kernels. With "auto" vLLM's choice stands: that ours are faster has not been measured on a GPU.
    1       first of all, also with "auto"
    0       never: vLLM does not hear of them

What they cannot do (other schemes, LoRA on experts, GPUs older than sm_80) stays with vLLM's kernels in every case.
On a CPU they are never chosen; there `cpu_linear` comes before vLLM's kernel, whatever the variable says: it is the
same but for weights that vLLM's refuses.

Not done here: choosing by architecture or by size.
"""

import functools
import os
from collections.abc import Callable
from enum import Enum
from typing import Any

VARIABLE = "GEMMA4Q_INT8_KERNELS"


class Wanted(Enum):
    """When ours are to be used, by the values of the variable."""

    ON_REQUEST = ("",)
    FIRST = ("1", "true", "yes", "on")
    NEVER = ("0", "false", "no", "off")


def wanted() -> Wanted:
    """What the environment asks for.

    Raises:
        ValueError: none of the values above.
    """
    value = os.environ.get(VARIABLE, "").lower()
    for choice in Wanted:
        if value in choice.value:
            return choice
    raise ValueError(f"{VARIABLE}: got {value!r}, expected 1 or 0")


def refusal(backend: str) -> str | None:
    """Why ours are not to be used, None where they are.

    Args:
        backend: what the user asked vLLM for: "auto", "triton" or another.
    """
    choice = wanted()
    if choice is Wanted.NEVER:
        return f"is switched off by {VARIABLE}={os.environ[VARIABLE]}"
    if choice is Wanted.FIRST or backend == "triton":
        return None
    return f"is used on request only ({VARIABLE}=1, or triton as the backend), got backend {backend!r}"


def register() -> None:
    """Tell vLLM of our kernels, as the environment asks for; may be called any number of times.

    Raises:
        ValueError: the variable has another value than those above.
    """
    choice = wanted()
    _register_variable()
    _register_cpu_linear()
    _register_linear(choice)
    _register_experts(choice)


def _register_variable() -> None:
    """Put the variable into the key of vLLM's cache of compiled models: a kernel's layout of weights is baked in."""
    from vllm import envs

    envs.environment_variables[VARIABLE] = lambda: wanted().name


def _register_cpu_linear() -> None:
    from vllm.model_executor.kernels.linear import _POSSIBLE_INT8_KERNELS, CPUInt8ScaledMMLinearKernel
    from vllm.platforms import PlatformEnum, current_platform

    if not current_platform.is_cpu():
        return
    from vllm_gemma4q.quark_int8.cpu_linear import Gemma4qCpuInt8LinearKernel

    kernels = _POSSIBLE_INT8_KERNELS[PlatformEnum.CPU]
    if Gemma4qCpuInt8LinearKernel not in kernels:
        kernels.insert(kernels.index(CPUInt8ScaledMMLinearKernel), Gemma4qCpuInt8LinearKernel)


def _register_linear(choice: Wanted) -> None:
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    from vllm_gemma4q.quark_int8.gpu_linear import Gemma4qInt8LinearKernel as Ours

    # `register_linear_kernel` would append, behind kernels that never refuse.
    for platform in (PlatformEnum.CUDA, PlatformEnum.ROCM):
        kernels = linear._POSSIBLE_INT8_KERNELS.setdefault(platform, [])
        if Ours in kernels:
            kernels.remove(Ours)
        if choice is not Wanted.NEVER:
            kernels.insert(0 if choice is Wanted.FIRST else _before_triton(kernels), Ours)
    triton = linear._LINEAR_BACKEND_KERNEL_MAP["triton"]
    (triton.discard if choice is Wanted.NEVER else triton.add)(Ours)


def _before_triton(kernels: list[type]) -> int:
    from vllm.model_executor.kernels.linear import TritonInt8ScaledMMLinearKernel

    found = TritonInt8ScaledMMLinearKernel in kernels
    return kernels.index(TritonInt8ScaledMMLinearKernel) if found else len(kernels)


def _register_experts(choice: Wanted) -> None:
    from vllm.model_executor.layers.fused_moe.oracle import int8

    offered = getattr(int8.backend_to_kernel_cls, "__wrapped__", None)
    if choice is Wanted.NEVER and offered is not None:
        int8.backend_to_kernel_cls = offered
    elif choice is not Wanted.NEVER and offered is None:
        int8.backend_to_kernel_cls = _with_ours(int8.backend_to_kernel_cls, int8.Int8MoeBackend.TRITON)


def _with_ours(upstream: Callable[[Any], list[type]], triton: Enum) -> Callable[[Any], list[type]]:
    """vLLM's list of experts for a backend, with ours before those in Triton. It has no registry to put them in."""

    @functools.wraps(upstream)
    def backend_to_kernel_cls(backend: Enum) -> list[type]:
        classes = upstream(backend)
        if backend is not triton:
            return classes
        # Imported here: most processes have no INT8 experts.
        from vllm_gemma4q.quark_int8.gpu_experts import Gemma4qInt8Experts

        return [Gemma4qInt8Experts, *classes]

    return backend_to_kernel_cls
