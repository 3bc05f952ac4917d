"""The FP8 Triton kernel: run in Triton's interpreter, and compiled for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import interpreted_fp8
import pytest
from gemma4q_kernels.fp8_scaled_mm.triton import Tile, has_fp8_instructions, scaled_mm_kernel, tile
from machine_code import MachineCode, compile_ahead

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "gfx1100", "gfx1201")
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "gfx1100": 64 << 10, "gfx1201": 64 << 10}
MATRIX = {
    "sm_80": r"\bHMMA\.",
    "sm_89": r"\bQMMA\.|\bHMMA\.",
    "sm_90": r"\bQGMMA\b|\bHMMA\.",  # warp groups need 64 rows: for fewer, Triton widens codes to float16
    "gfx1100": r"v_wmma_f32_16x16x16_f16",
    "gfx1201": r"v_wmma_f32_16x16x16_fp8_fp8",
}
CASES = [(name, m) for name in ARCHITECTURES for m in (1, 4096)]


def test_kernel_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(interpreted_fp8.__file__)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(interpreted_fp8.SHAPES) + 1


@pytest.fixture
def no_cached_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def code_for(architecture: str, shape: Tile, *, native: bool, even_k: bool) -> MachineCode:
    codes = "*fp8e4nv" if native else "*i8"
    types = {"x_ptr": codes, "x_scale_ptr": "*fp32", "w_ptr": codes, "w_scale_ptr": "*fp32", "bias_ptr": "*bf16"}
    types |= {"out_ptr": "*bf16"} | dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn", "stride_om"), "i32")
    constants = {
        "HAS_BIAS": True,
        "EVEN_K": even_k,
        "NATIVE": native,
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "BLOCK_K": shape.block_k,
        "GROUP_M": shape.group_m,
    }
    multiples = tuple(name for name in types if name != "M")
    options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages, "enable_fp_fusion": False}
    return compile_ahead(scaled_mm_kernel, architecture, types, constants, multiples, options)


@pytest.mark.parametrize("even_k", [True, False], ids=["even-k", "odd-k"])
@pytest.mark.parametrize(("architecture", "m"), CASES, ids=[f"{name}-M{m}" for name, m in CASES])
def test_every_tile(architecture: str, m: int, even_k: bool, no_cached_code: None) -> None:
    native = has_fp8_instructions(architecture)
    code = code_for(architecture, tile(architecture, m), native=native, even_k=even_k)
    assert code.count(MATRIX[architecture]) > 0
    assert code.spills == 0
    assert 0 < code.shared <= SHARED_LIMIT[architecture]


def test_hopper_multiplies_codes_and_others_widen_them(no_cached_code: None) -> None:
    code = code_for("sm_90", tile("sm_90", 4096), native=True, even_k=True)
    assert code.count(r"\bQGMMA\b") > 0 and code.count(r"\bHG?MMA\b") == 0
    assert code_for("sm_90", tile("sm_80", 4096), native=False, even_k=True).count(r"\bHG?MMA\b") > 0
