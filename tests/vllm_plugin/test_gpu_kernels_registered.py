"""Our INT8 kernels for GPUs among vLLM's: where they stand, what they refuse and why, and their numbers.

Nothing here launches on a GPU: numbers come from Triton's interpreter, in a process of its own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm_plugin import interpreted_gpu_kernels
from vllm_plugin.gpu_kernel_configs import activation_format, experts_config, linear_config

from vllm_gemma4q.quark_int8 import kernels

OURS, TRITON = "Gemma4qInt8LinearKernel", "TritonInt8ScaledMMLinearKernel"
CUTLASS, HUMMING, AITER = (f"{name}Int8ScaledMMLinearKernel" for name in ("Cutlass", "Humming", "Aiter"))
ORDER = {
    None: {"CUDA": [CUTLASS, OURS, TRITON, HUMMING], "ROCM": [AITER, OURS, TRITON]},
    "1": {"CUDA": [OURS, CUTLASS, TRITON, HUMMING], "ROCM": [OURS, AITER, TRITON]},
    "0": {"CUDA": [CUTLASS, TRITON, HUMMING], "ROCM": [AITER, TRITON]},
}

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def unregistered_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts with the variable unset and leaves vLLM's registries as without us."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    yield
    monkeypatch.setenv(kernels.VARIABLE, "0")
    kernels.register()


def _registered() -> dict[str, list[str]]:
    from vllm.model_executor.kernels.linear import _POSSIBLE_INT8_KERNELS

    names = {platform.name: [kernel.__name__ for kernel in found] for platform, found in _POSSIBLE_INT8_KERNELS.items()}
    assert all(OURS not in names[platform] for platform in ("CPU", "XPU"))
    return {platform: names[platform] for platform in ("CUDA", "ROCM")}


def _filtered(backend: str) -> list[str]:
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    found = linear._filter_kernels_by_backend(backend, linear._POSSIBLE_INT8_KERNELS[PlatformEnum.CUDA])
    return [kernel.__name__ for kernel in found]


def _experts(backend: str) -> list[str]:
    from vllm.model_executor.layers.fused_moe.oracle import int8

    return [kernel.__name__ for kernel in int8.backend_to_kernel_cls(int8.Int8MoeBackend[backend])]


@pytest.mark.parametrize("value", list(ORDER))
def test_order_for_each_value(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv(kernels.VARIABLE, value)
    for _ in range(2):  # a second call changes nothing
        kernels.register()
        assert _registered() == ORDER[value]
        assert _filtered("triton") == ([TRITON] if value == "0" else [OURS, TRITON])
        assert _experts("TRITON") == (["TritonExperts"] if value == "0" else ["Gemma4qInt8Experts", "TritonExperts"])
        assert "Gemma4qInt8Experts" not in _experts("HUMMING") + _experts("CPU")


def test_switching_off_restores_vllms_function(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.oracle import int8

    before = int8.backend_to_kernel_cls
    kernels.register()
    assert int8.backend_to_kernel_cls is not before
    monkeypatch.setenv(kernels.VARIABLE, "0")
    kernels.register()
    assert int8.backend_to_kernel_cls is before


def test_the_first_layer_of_a_checkpoint_registers() -> None:
    import torch

    from vllm_gemma4q.quark_int8.config import QuarkInt8Config
    from vllm_gemma4q.quark_int8.linear import int8_linear_method

    assert OURS not in _registered()["CUDA"]
    int8_linear_method(QuarkInt8Config(()), torch.nn.Module())
    assert OURS in _registered()["CUDA"]


def test_compiled_models_are_kept_apart_by_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    kernels.register()
    factors = [envs.compile_factors()]
    for value in ("1", "0"):
        monkeypatch.setenv(kernels.VARIABLE, value)
        factors.append(envs.compile_factors())
    assert [found[kernels.VARIABLE] for found in factors] == ["ON_REQUEST", "FIRST", "NEVER"]


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "maybe")
    with pytest.raises(ValueError, match="GEMMA4Q_INT8_KERNELS: got 'maybe', expected 1 or 0"):
        kernels.register()


def test_a_cpu_is_refused() -> None:
    from vllm_gemma4q.quark_int8.gpu_experts import Gemma4qInt8Experts
    from vllm_gemma4q.quark_int8.gpu_linear import Gemma4qInt8LinearKernel

    reason = "triton launches on GPUs (on a CPU only under TRITON_INTERPRET=1), got device cpu"
    assert Gemma4qInt8LinearKernel.is_supported() == (False, reason)
    assert _ask_experts(Gemma4qInt8Experts, experts_config(moe_backend="triton")) == (False, f"kernel {reason}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_channelwise": False}, "needs a weight scale a channel, got one a tensor"),
        ({"is_static_input_scheme": True}, "needs dynamic activation scales, got static ones"),
        ({"input_symmetric": False}, "needs symmetric activations, got zero points"),
        ({}, None),
    ],
)
def test_linears_it_can_do(change: dict[str, bool], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_gemma4q.quark_int8.gpu_linear import Gemma4qInt8LinearKernel

    config = replace(linear_config(), **change)
    on_request = "is used on request only (GEMMA4Q_INT8_KERNELS=1, or triton as the backend), got backend 'auto'"
    assert Gemma4qInt8LinearKernel.can_implement(config) == (False, reason or on_request)
    monkeypatch.setenv(kernels.VARIABLE, "1")
    assert Gemma4qInt8LinearKernel.can_implement(config) == (reason is None, reason)
    monkeypatch.setenv(kernels.VARIABLE, "0")
    assert Gemma4qInt8LinearKernel.can_implement(config)[0] is False


def test_asking_for_triton_asks_for_ours() -> None:
    from vllm.config import KernelConfig, VllmConfig, set_current_vllm_config

    from vllm_gemma4q.quark_int8.gpu_linear import Gemma4qInt8LinearKernel

    for backend, answer in (("triton", True), ("cutlass", False)):
        with set_current_vllm_config(VllmConfig(kernel_config=KernelConfig(linear_backend=backend))):
            assert Gemma4qInt8LinearKernel.can_implement(linear_config())[0] is answer


def _ask_experts(cls: Any, config: Any) -> tuple[bool, str | None]:
    from vllm.model_executor.layers.quantization.utils.quant_utils import kInt8DynamicTokenSym, kInt8StaticChannelSym

    answer: tuple[bool, str | None] = cls.is_supported_config(
        cls, config, kInt8StaticChannelSym, kInt8DynamicTokenSym, activation_format()
    )
    return answer


def test_numbers_and_refusals_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(interpreted_gpu_kernels.__file__)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    printed = done.stdout.splitlines()
    assert [check.__name__ in printed for check in interpreted_gpu_kernels.CHECKS] == [True] * 8
