"""The fused quantization steps: the reference, refusals, the interpreter, and what the kernels compile to."""

import os
import subprocess
import sys
from pathlib import Path

import interpreted_fused
import pytest
import torch
from gemma4q_kernels import fused_quantize
from gemma4q_kernels.fused_quantize import ROUNDINGS, gated_quantize, rms_norm_quantize
from gemma4q_kernels.fused_quantize.triton import (
    block_and_warps,
    gated_quantize_kernel,
    rms_norm_quantize_kernel,
)
from gemma4q_kernels.grouped_mm.activation import activate
from gemma4q_kernels.int8_scaled_mm import quantize_per_token
from machine_code import MachineCode, compile_ahead

ARCHITECTURES = [
    "sm_90",
    "gfx1100",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_89", "gfx1201")),
]
WIDE_LOAD = r"LDG\.E\S*\.128|(?:global|buffer)_load_b128"
WIDE_STORE = r"STG\.E\S*\.128|(?:global|buffer)_store_b128"
# Multiplications that end up in a fused operation: what `enable_fp_fusion=False` forbids.
FUSED = r"\bFFMA\b|v_(?:dual_)?fma(?:c|ak|mk)?_f32"


def test_kernels_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(interpreted_fused.__file__)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shapes = len(interpreted_fused.NORM_SHAPES) + len(interpreted_fused.GATED_SHAPES)
    assert len(done.stdout.splitlines()) == shapes * len(interpreted_fused.DTYPES) * len(ROUNDINGS) + 4


def test_reference_norm_is_what_engines_compute() -> None:
    """Twice rounded: vLLM's rms_norm; once: transformers' Gemma 4; each followed by per-token quantization."""
    x, residual = torch.randn(5, 96).bfloat16(), torch.randn(5, 96).bfloat16()
    weight, before = torch.randn(96).bfloat16(), torch.randn(96).bfloat16()

    def norm(value: torch.Tensor, scale: torch.Tensor, rounding: str) -> torch.Tensor:
        wide = value.float() * torch.rsqrt(value.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return wide.bfloat16() * scale if rounding == "twice" else (wide * scale.float()).bfloat16()

    for rounding in ("once", "twice"):
        total = norm(x, before, rounding) + residual
        q, scale = quantize_per_token(norm(total, weight, rounding))
        got = rms_norm_quantize(x, weight, residual, input_weight=before, rounding=rounding)
        assert got.residual is not None and torch.equal(got.residual, total)
        assert torch.equal(got.q, q) and torch.equal(got.scale, scale)
        alone = rms_norm_quantize(total, weight, rounding=rounding)
        assert torch.equal(alone.q, q) and torch.equal(alone.scale, scale) and alone.residual is None


def test_reference_gate_is_what_engines_compute() -> None:
    gate_up = torch.randn(5, 192).bfloat16() * 3
    gate, up = gate_up.chunk(2, dim=1)
    for activation in ("gelu_tanh", "silu"):
        for rounding, product in (
            ("twice", activate(gate, activation) * up),
            ("none", activate(gate.float(), activation) * up.float()),
        ):
            got = gated_quantize(gate_up, activation, rounding=rounding)
            assert all(torch.equal(a, b) for a, b in zip(got, quantize_per_token(product), strict=True))


def test_refusals() -> None:
    x, weight = torch.ones(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"weight: got torch.float32 \(7,\), expected float \[8\]"):
        rms_norm_quantize(x, weight[1:])
    with pytest.raises(ValueError, match=r"residual: got torch.float16 \(3, 8\), expected torch.float32"):
        rms_norm_quantize(x, weight, x.half())
    with pytest.raises(ValueError, match="input_weight: got a norm in front of an addition"):
        rms_norm_quantize(x, weight, input_weight=weight)
    with pytest.raises(ValueError, match="rounding: got 'thrice'"):
        rms_norm_quantize(x, weight, rounding="thrice")
    with pytest.raises(ValueError, match="x: got torch.int8"):
        rms_norm_quantize(x.to(torch.int8), weight)
    with pytest.raises(ValueError, match="gate_up: got 7 columns"):
        gated_quantize(x[:, 1:])
    with pytest.raises(ValueError, match="activation: got 'relu'"):
        gated_quantize(x, "relu")
    with pytest.raises(ValueError, match="triton: triton launches on GPUs"):
        gated_quantize(x, backend="triton")
    assert fused_quantize.choose("cpu", 3, 8, 8, torch.float32).name == "reference"


@pytest.fixture(autouse=True)
def no_cached_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def norm_code(
    architecture: str, width: int, *, rounding: int = 2, aligned: bool = True, **options: object
) -> MachineCode:
    floats = ("x_ptr", "residual_ptr", "weight_ptr", "input_weight_ptr", "sum_ptr")
    integers = ("H", "stride_x", "stride_residual")
    types = dict.fromkeys(floats, "*bf16") | dict.fromkeys(integers, "i32")
    types |= {"q_ptr": "*i8", "scale_ptr": "*fp32", "eps": "fp32"}
    block, warps = block_and_warps(width)
    constants: dict[str, object] = {"ADD": True, "NORM_INPUT": True, "ROUNDING": rounding, "BLOCK": block}
    multiples = (*floats, "q_ptr", *integers) if aligned else ()
    options = {"num_warps": warps, "enable_fp_fusion": False} | options
    return compile_ahead(rms_norm_quantize_kernel, architecture, types, constants, multiples, options)


def gated_code(architecture: str, width: int, *, rounding: int = 0, **options: object) -> MachineCode:
    types = {"x_ptr": "*bf16", "q_ptr": "*i8", "scale_ptr": "*fp32", "WIDTH": "i32", "stride_x": "i32"}
    block, warps = block_and_warps(width)
    constants = {"SILU": False, "ROUNDING": rounding, "ONE_BLOCK": width <= block, "BLOCK": block}
    options = {"num_warps": warps, "enable_fp_fusion": False} | options
    return compile_ahead(
        gated_quantize_kernel, architecture, types, constants, ("x_ptr", "q_ptr", "WIDTH", "stride_x"), options
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("width", [2816, 5376])
def test_norm_compiles_without_spills(architecture: str, width: int) -> None:
    code = norm_code(architecture, width)
    assert code.spills == 0
    assert code.count(WIDE_LOAD) >= 4 and code.count(WIDE_STORE) >= 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("width", [704, 21504])
def test_gate_compiles_without_spills(architecture: str, width: int) -> None:
    code = gated_code(architecture, width)
    assert code.spills == 0
    if width > 704:  # a shorter row has fewer values than lanes of 16 bytes
        assert code.count(WIDE_LOAD) >= 2


def test_control_too_few_registers_spill() -> None:
    assert norm_code("sm_90", 2816, maxnreg=24).spills > 0


def test_control_unaligned_arguments_lose_the_wide_loads() -> None:
    assert norm_code("sm_90", 5376, aligned=False).count(WIDE_LOAD) == 0


@pytest.mark.parametrize("architecture", ["sm_90", "gfx1100"])
def test_products_that_are_rounded_are_not_fused(architecture: str) -> None:
    """A fused multiply-add would round x * inverse + 1.5 * 2**23 once, and ties otherwise than defined."""
    assert norm_code(architecture, 2816).count(FUSED) < norm_code(architecture, 2816, enable_fp_fusion=True).count(
        FUSED
    )


def test_bfloat16_is_rounded_in_between() -> None:
    """The interpreter cannot tell, for it truncates; the machine code can. PTX's compiler may multiply in bfloat16."""
    rounds = r"F2FP?\.BF16|H(?:FMA|MUL)2\S*\.BF16"
    assert [gated_code("sm_90", 2816, rounding=times).count(rounds) > 0 for times in range(3)] == [False, True, True]
    assert gated_code("sm_90", 2816, rounding=2).text != gated_code("sm_90", 2816, rounding=1).text
