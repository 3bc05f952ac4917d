"""Who can multiply BF16 activations with a Gemma 4 weight here: `gemma4q_kernels`, torch, and vLLM where installed.

Every INT8 contender starts from BF16 activations and ends in BF16: quantizing per token is part of its time. Weights
are brought into its own layout before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from gemma4q_kernels.int8_scaled_mm import linear, pack, pack_linear, quantize_per_token
from gemma4q_kernels.int8_scaled_mm.cpu_few_rows import MAX_ROWS
from gemma4q_kernels.support import YES, Support, architecture, int_mm_is_exact, no, vllm_onednn

Linear = Callable[[torch.Tensor], torch.Tensor]
BASELINE = "bf16 F.linear"
OURS = "gemma4q"
OURS_FEW_ROWS = "gemma4q few rows"  # on a CPU, in the layout for them


@dataclass(frozen=True)
class Weight:
    """One weight [N, K] in both forms: bfloat16, and int8 with a float32 scale a row."""

    bf16: torch.Tensor
    q: torch.Tensor
    scale: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.bf16.device


@dataclass(frozen=True)
class Contender:
    """A way to multiply. can_run: on a device, at M rows. prepare: brings a weight into its layout, once."""

    name: str
    can_run: Callable[[torch.device, int], Support]
    prepare: Callable[[Weight], Linear]
    bytes_a_weight: int = 1


def _always(device: torch.device, m: int) -> Support:
    return YES


def _cpu_with_few_rows(device: torch.device, m: int) -> Support:
    if device.type != "cpu":
        return no(f"runs on the CPU, got device {device}")
    return YES if m <= MAX_ROWS else no(f"for at most {MAX_ROWS} rows, got M = {m}")


def _cpu_with_vllm(device: torch.device, m: int) -> Support:
    return vllm_onednn() if device.type == "cpu" else no(f"runs on the CPU, got device {device}")


def _cpu_with_vllm_sgl(device: torch.device, m: int) -> Support:
    support = _cpu_with_vllm(device, m)
    if support and not hasattr(torch.ops._C, "int8_scaled_mm_with_quant"):
        return no("this build of vllm has no int8_scaled_mm_with_quant")
    return support


def _cpu_with_onednn(device: torch.device, m: int) -> Support:
    if device.type != "cpu":
        return no(f"runs on the CPU, got device {device}")
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return no("this build of torch has no oneDNN")
    return _qlinear_is_exact()


@cache
def _qlinear_is_exact() -> Support:
    """By the largest values: on x86 without VNNI it sums in saturating 16 bits, also where `_int_mm` does not."""
    codes = torch.full((16, 64), 127, dtype=torch.int8)
    product = _prepare_qlinear(Weight(codes.bfloat16(), codes, torch.ones(16)))(codes.bfloat16())
    exact = product.new_tensor(64 * 127 * 127)
    return YES if bool((product == exact).all()) else no("oneDNN saturates on this CPU (x86 without VNNI)")


def _int_mm_can_run(device: torch.device, m: int) -> Support:
    if device.type == "cpu":
        return int_mm_is_exact()
    return YES if m > 16 else no(f"torch._int_mm on a GPU needs M > 16, got M = {m}")


def _gpu_with_cutlass(device: torch.device, m: int) -> Support:
    arch = architecture(device)
    if device.type != "cuda" or not arch.startswith("sm_"):
        return no(f"CUTLASS runs on NVIDIA GPUs, got {arch}")
    try:
        from vllm import _custom_ops as ops
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return no(f"vllm does not import: {error}")
    return YES if hasattr(ops, "cutlass_scaled_mm") else no("this build of vllm has no cutlass_scaled_mm")


def _prepare_bf16(weight: Weight) -> Linear:
    return lambda x: torch.nn.functional.linear(x, weight.bf16)


def _prepare_ours(weight: Weight) -> Linear:
    if weight.device.type == "cpu":
        return pack(weight.q, weight.scale).linear
    return lambda x: linear(x, weight.q, weight.scale)


def _prepare_ours_few_rows(weight: Weight) -> Linear:
    return pack_linear(weight.q, weight.scale, rows=1).linear


def _prepare_int_mm(weight: Weight) -> Linear:
    return lambda x: linear(x, weight.q, weight.scale, backend="int_mm")


def _prepare_vllm_onednn(weight: Weight) -> Linear:
    packed = pack(weight.q, weight.scale, backend="onednn")

    def run(x: torch.Tensor) -> torch.Tensor:
        x_q = torch.empty(x.shape, dtype=torch.int8)
        x_scale = torch.empty((len(x), 1), dtype=torch.float32)
        torch.ops._C.dynamic_scaled_int8_quant(x_q, x, x_scale, None)
        return packed.scaled_mm(x_q, x_scale)

    return run


def _prepare_vllm_sgl(weight: Weight) -> Linear:
    packed = torch.ops._C.convert_weight_packed(weight.q)

    def run(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops._C.int8_scaled_mm_with_quant(x, packed, weight.scale, None, x.dtype, True)
        return out

    return run


def _prepare_qlinear(weight: Weight) -> Linear:
    """torch's oneDNN linear takes one scale for all of x, so that of each token is multiplied afterwards."""
    packed = torch.ops.onednn.qlinear_prepack(weight.q, None)
    zeros = torch.zeros(len(weight.q), dtype=torch.int32)

    def run(x: torch.Tensor) -> torch.Tensor:
        x_q, x_scale = quantize_per_token(x)
        scaled = torch.ops.onednn.qlinear_pointwise(
            x_q, 1.0, 0, packed, weight.scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        out: torch.Tensor = scaled.mul_(x_scale).to(x.dtype)
        return out

    return run


def _prepare_cutlass(weight: Weight) -> Linear:
    from vllm import _custom_ops as ops

    columns, scale = weight.q.t(), weight.scale.reshape(-1, 1)

    def run(x: torch.Tensor) -> torch.Tensor:
        x_q, x_scale, _ = ops.scaled_int8_quant(x)
        out: torch.Tensor = ops.cutlass_scaled_mm(x_q, columns, x_scale, scale, x.dtype)
        return out

    return run


CONTENDERS = (
    Contender(BASELINE, _always, _prepare_bf16, bytes_a_weight=2),
    Contender(OURS, _always, _prepare_ours),
    Contender(OURS_FEW_ROWS, _cpu_with_few_rows, _prepare_ours_few_rows),
    Contender("torch._int_mm", _int_mm_can_run, _prepare_int_mm),
    Contender("torch onednn.qlinear", _cpu_with_onednn, _prepare_qlinear),
    Contender("vllm onednn_scaled_mm", _cpu_with_vllm, _prepare_vllm_onednn),
    Contender("vllm int8_scaled_mm_with_quant", _cpu_with_vllm_sgl, _prepare_vllm_sgl),
    Contender("vllm cutlass_scaled_mm", _gpu_with_cutlass, _prepare_cutlass),
)
