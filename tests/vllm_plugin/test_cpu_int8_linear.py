"""INT8 linears on a CPU, of sizes that vLLM's packing for AMX takes, refuses, or never sees.

Where there is no AMX, vLLM is told that there is: which operator is chosen shows all the same.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch
from gemma4q_kernels.int8_scaled_mm import cpu, quantize_per_channel
from gemma4q_kernels.support import YES, Support, no
from tolerances import INT8_AGAINST_BF16, rms_error

pytestmark = pytest.mark.engine

K = 64


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Operators that weights were packed for; SGLang's is not asked where the processor lacks AMX.

    Where oneDNN saturates it is taken for exact: nothing is multiplied then.
    """
    from vllm.model_executor.kernels.linear import CPUInt8ScaledMMLinearKernel as Theirs

    found: list[str] = []
    monkeypatch.setattr(cpu, "_packed_is_exact", lambda: YES)
    with_amx = torch.cpu._is_amx_tile_supported()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for name in ("onednn", "sgl"):
        pack = getattr(Theirs, f"process_weights_for_{name}")

        def recorded(self: Any, layer: Any, name: str = name, pack: Any = pack) -> None:
            found.append(name)
            if name == "onednn" or with_amx:
                pack(self, layer)

        monkeypatch.setattr(Theirs, f"process_weights_for_{name}", recorded)
    return found


@pytest.fixture
def kernel() -> Any:
    """As vLLM chooses it for a claimed checkpoint."""
    from vllm.model_executor.kernels.linear import init_int8_linear_kernel
    from vllm.platforms import current_platform

    from vllm_gemma4q.quark_int8 import kernels

    current_platform.import_kernels()
    kernels.register()
    kernels.register()
    return init_int8_linear_kernel(True, False, True, "test")


def layer_of(weight: torch.Tensor) -> torch.nn.Module:
    """A linear as Quark's scheme leaves it."""
    w_q, w_scale = quantize_per_channel(weight)
    layer = torch.nn.Module()
    layer.logical_widths = [len(weight)]
    layer.weight = torch.nn.Parameter(w_q, requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(w_scale.reshape(-1, 1), requires_grad=False)
    layer.input_scale = layer.input_zero_point = layer.azp_adj = layer.bias = None
    return layer


def load(kernel: Any, layer: torch.nn.Module) -> None:
    """As vLLM does: around weights that were loaded the default dtype is the activations'."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        kernel.process_weights_after_loading(layer)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("rows", "operator"), [(16, "onednn"), (48, "onednn"), (24, "onednn"), (1, "onednn"), (32, "sgl"), (96, "sgl")]
)
def test_operator_by_rows(rows: int, operator: str, chosen: list[str], kernel: Any) -> None:
    load(kernel, layer_of(torch.ones(rows, K)))
    assert chosen == [operator]


@pytest.mark.parametrize("exact", [YES, no("saturates")], ids=["as it is", "saturating"])
@pytest.mark.parametrize("rows", [1, 24, 48, 64])
def test_products_on_this_processor(rows: int, exact: Support, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of 127 everywhere: the most that a sum of 16 bits can be wrong."""
    if not exact:
        monkeypatch.setattr(cpu, "_packed_is_exact", lambda: exact)
    layer = layer_of(torch.ones(rows, K))
    load(kernel, layer)
    got = kernel.apply_weights(layer, torch.ones(2, 3, K, dtype=torch.bfloat16))
    assert got.shape == (2, 3, rows)
    assert rms_error(got.float(), torch.full((2, 3, rows), float(K))) < INT8_AGAINST_BF16


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (48, 32), (80, 96)])
def test_vllm_itself_chooses_the_packing_that_refuses(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this fails vLLM has mended it, and `cpu_linear` may go."""
    from vllm.model_executor.layers.utils import check_cpu_sgl_kernel

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert check_cpu_sgl_kernel(rows, columns, torch.int8)
    if hasattr(torch.ops._C, "convert_weight_packed"):
        with pytest.raises(RuntimeError, match="Expected N == BLOCK_N"):
            torch.ops._C.convert_weight_packed(torch.zeros(rows, columns, dtype=torch.int8))


def test_other_schemes_stay_with_vllm() -> None:
    from vllm.model_executor.kernels.linear import init_int8_linear_kernel

    from vllm_gemma4q.quark_int8 import kernels

    kernels.register()
    for scheme in [(False, False, True), (True, True, True), (True, False, False)]:
        assert type(init_int8_linear_kernel(*scheme, "test")).__name__ == "CPUInt8ScaledMMLinearKernel"


AMX_FIRST = """
import ctypes, sys, torch
sys.path.insert(0, {tests!r})
from vllm.platforms import current_platform
from vllm.model_executor.kernels.linear import init_int8_linear_kernel
from vllm_gemma4q.quark_int8 import kernels
from vllm_plugin.test_cpu_int8_linear import layer_of
current_platform.import_kernels()
kernels.register()
torch.set_default_dtype(torch.bfloat16)
init_int8_linear_kernel(True, False, True, "test").process_weights_after_loading(layer_of(torch.randn(64, 64)))
granted = ctypes.c_uint64()
assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(granted)) == 0  # arch_prctl, ARCH_GET_XCOMP_PERM
assert granted.value >> 18 & 1, hex(granted.value)
"""


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs a processor with AMX")
def test_a_fresh_process_may_use_amx_once_a_weight_is_loaded() -> None:
    """vLLM's attention does, and Linux ends processes that never asked."""
    tests = __file__.rpartition("/vllm_plugin/")[0]
    subprocess.run([sys.executable, "-c", AMX_FIRST.format(tests=tests)], check=True, timeout=300)
