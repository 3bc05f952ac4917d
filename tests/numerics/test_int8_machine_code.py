"""What the INT8 Triton kernels compile to, for GPUs that are not here: matrix instructions, no spills, wide loads."""

from pathlib import Path

import pytest
import torch
from gemma4q_kernels.int8_scaled_mm.tiles import Tile, table, tile
from gemma4q_kernels.int8_scaled_mm.triton import quantize_per_token_kernel, scaled_mm_kernel
from machine_code import MachineCode, compile_ahead

ARCHITECTURES = ("sm_80", "sm_90", "gfx1100", "gfx1201")
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx1100": 64 << 10, "gfx1201": 64 << 10}
MATRIX = {
    "sm_80": r"\bIMMA\.",
    "sm_90": r"\bIG?MMA\b",
    "gfx1100": r"v_wmma_i32_16x16x16_iu8",
    "gfx1201": r"v_wmma_i32_16x16x16_iu8",
}
WIDE_LOAD = {
    "sm_80": r"LDGSTS\.E\S*\.128",
    "sm_90": r"LDGSTS\.E\S*\.128",
    "gfx1100": r"(?:global|buffer)_load_b128",
    "gfx1201": r"(?:global|buffer)_load_b128",
}
TILES = [(name, shape) for name in ARCHITECTURES for _, shape in table(name)]
TILE_IDS = [f"{name}-{t.block_m}x{t.block_n}x{t.block_k}" for name, t in TILES]


@pytest.fixture(autouse=True)
def no_cached_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def scaled_mm_code(architecture: str, shape: Tile, *, even_k: bool = True, aligned: bool = True) -> MachineCode:
    types = {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "w_ptr": "*i8", "w_scale_ptr": "*fp32", "bias_ptr": "*bf16"}
    types |= {"out_ptr": "*bf16"} | dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn", "stride_om"), "i32")
    constants = {
        "HAS_BIAS": True,
        "EVEN_K": even_k,
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "BLOCK_K": shape.block_k,
        "GROUP_M": shape.group_m,
    }
    multiples = tuple(name for name in types if name != "M") if aligned else ()
    options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages, "enable_fp_fusion": False}
    return compile_ahead(scaled_mm_kernel, architecture, types, constants, multiples, options)


@pytest.mark.parametrize("even_k", [True, False], ids=["even-k", "odd-k"])
@pytest.mark.parametrize(("architecture", "shape"), TILES, ids=TILE_IDS)
def test_every_tile(architecture: str, shape: Tile, even_k: bool) -> None:
    code = scaled_mm_code(architecture, shape, even_k=even_k)
    assert code.count(MATRIX[architecture]) > 0
    assert code.count(WIDE_LOAD[architecture]) > 0
    assert code.spills == 0
    assert 0 < code.shared <= SHARED_LIMIT[architecture]


def test_hopper_uses_its_own_matrix_instructions() -> None:
    assert scaled_mm_code("sm_90", tile("sm_90", 4096)).count(r"\bIGMMA\b") > 0


def test_control_a_tile_too_large_spills() -> None:
    assert scaled_mm_code("gfx1100", Tile(256, 256, 64, 8, 2)).spills > 0


def test_control_unaligned_arguments_lose_the_wide_loads() -> None:
    shape = tile("sm_90", 4096)
    assert scaled_mm_code("sm_90", shape, aligned=False).count(WIDE_LOAD["sm_90"]) == 0


def quantization_code(architecture: str, dtype: str, *, fusion: bool = False) -> MachineCode:
    types = {"x_ptr": dtype, "q_ptr": "*i8", "scale_ptr": "*fp32", "K": "i32", "stride_x": "i32"}
    multiples = ("x_ptr", "q_ptr", "K", "stride_x")
    options: dict[str, object] = {"num_warps": 8, "enable_fp_fusion": fusion}
    return compile_ahead(quantize_per_token_kernel, architecture, types, {"BLOCK_K": 2048}, multiples, options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
def test_quantization(architecture: str, dtype: str) -> None:
    code = quantization_code(architecture, dtype)
    assert code.spills == 0
    assert code.count(r"LDG\.E\S*\.128|(?:global|buffer)_load_b128") > 0


@pytest.mark.parametrize(("architecture", "product"), [("sm_90", r"\bFMUL\b"), ("gfx1100", r"v_(?:dual_)?mul_f32")])
def test_quantization_does_not_fuse_the_product_it_rounds(architecture: str, product: str) -> None:
    """A fused multiply-add would round x * inverse + 1.5 * 2**23 once, and ties otherwise than defined."""
    assert quantization_code(architecture, "*bf16").count(product) > 0
    assert quantization_code(architecture, "*bf16").count(product) > quantization_code(
        architecture, "*bf16", fusion=True
    ).count(product)


def test_tables_serve_every_m() -> None:
    for name in (*ARCHITECTURES, "gfx942", "unheard of"):
        limits = [limit for limit, _ in table(name)]
        assert limits == sorted(set(limits)) and limits[-1] >= torch.iinfo(torch.int32).max
        assert tile(name, 1) == table(name)[0][1] and tile(name, 1 << 31) == table(name)[-1][1]
