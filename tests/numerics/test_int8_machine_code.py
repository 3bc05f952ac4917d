"""What the INT8 Triton kernels compile to, for GPUs that are not here: matrix instructions, no spills, wide loads."""

from collections.abc import Iterator
from functools import cache

import pytest
from gemma4q_kernels.int8_scaled_mm.tiles import Row, Tile, packaged, table
from gemma4q_kernels.int8_scaled_mm.triton import quantize_per_token_kernel, reduce_kernel, scaled_mm_kernel
from machine_code import UNITS, MachineCode, compile_ahead

ARCHITECTURES = ("gfx1100", "gfx1101", "gfx1201", "sm_80", "sm_89", "sm_90")
AMPERE_LOAD = r"LDGSTS\.E\S*\.128"  # asynchronous, from global to shared memory
AMD_LOAD = r"(?:global|buffer)_load_b128"
BYTE_LOAD = r"LDG\.E\.[US]8|(?:global|buffer)_load_(?:d16_)?(?:hi_)?[ui]8"
ROWS = [(name, row) for name in ARCHITECTURES for row in table(name)[0].rows]
# The same instructions and registers as the architecture before: one variant of each of its rows is enough.
SAME_CODE = {"gfx1101": "gfx1100", "sm_89": "sm_80"}
REMAINDER_ROWS = [
    (name, row)
    for name, row in ROWS
    if name not in SAME_CODE or row.tile not in [other.tile for other in table(SAME_CODE[name])[0].rows]
]


def row_id(value: object) -> str:
    """`gfx1100-16x32x128`, from the two parameters of a test."""
    shape = value.tile if isinstance(value, Row) else None
    return str(value) if shape is None else f"{shape.block_m}x{shape.block_n}x{shape.block_k}"


@pytest.fixture(autouse=True, scope="module")
def no_cached_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def wide_load(architecture: str) -> str:
    return AMD_LOAD if architecture.startswith("gfx") else AMPERE_LOAD


def matrix_instruction(architecture: str, shape: Tile) -> str:
    """Hopper's own instruction multiplies 64 rows at once; fewer are left to the one before."""
    if architecture.startswith("gfx"):
        return r"\bv_wmma_i32_16x16x16_iu8\b"
    return r"\bIGMMA\." if architecture == "sm_90" and shape.block_m >= 64 else r"\bIMMA\."


@cache
def scaled_mm_code(
    architecture: str, shape: Tile, *, even_k: bool = True, split_k: int = 1, aligned: bool = True
) -> MachineCode:
    types = {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "w_ptr": "*i8", "w_scale_ptr": "*fp32", "bias_ptr": "*bf16"}
    types |= {"out_ptr": "*bf16" if split_k == 1 else "*i32"}
    types |= dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn"), "i32")
    constants = {
        "HAS_BIAS": split_k == 1,
        "EVEN_K": even_k,
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "BLOCK_K": shape.block_k,
        "GROUP_M": shape.group_m,
        "SPLIT_K": split_k,
    }
    multiples = tuple(name for name in types if name != "M") if aligned else ()
    options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages, "enable_fp_fusion": False}
    return compile_ahead(scaled_mm_kernel, architecture, types, constants, multiples, options)


def test_every_table_is_compiled_here() -> None:
    assert packaged() == ARCHITECTURES


def check(architecture: str, shape: Tile, code: MachineCode) -> None:
    assert code.spills == 0
    assert code.count(matrix_instruction(architecture, shape)) > 0
    assert code.count(wide_load(architecture)) > 0
    assert code.count(BYTE_LOAD) == 0
    assert 0 < code.shared <= UNITS[architecture].largest
    assert code.occupancy(architecture, shape.num_warps) > 0


@pytest.mark.parametrize(("architecture", "row"), ROWS, ids=row_id)
def test_every_row(architecture: str, row: Row) -> None:
    check(architecture, row.tile, scaled_mm_code(architecture, row.tile))


@pytest.mark.parametrize(("architecture", "row"), REMAINDER_ROWS, ids=row_id)
def test_every_row_with_a_remainder_of_k(architecture: str, row: Row) -> None:
    """Divided where the row divides K, as decoding shapes are."""
    split_k = 1 if row.split_k == 1 else 2
    check(architecture, row.tile, scaled_mm_code(architecture, row.tile, even_k=False, split_k=split_k))


def test_control_a_tile_too_large_spills() -> None:
    shape = Tile(block_m=128, block_n=256, block_k=32, num_warps=4, num_stages=2)
    with pytest.raises(AssertionError, match="spills"):
        check("gfx1100", shape, scaled_mm_code("gfx1100", shape))


@pytest.mark.parametrize("architecture", ["sm_90", "gfx1100"])
def test_control_unaligned_arguments_are_loaded_by_bytes(architecture: str) -> None:
    shape = table(architecture)[0].rows[0].tile
    code = scaled_mm_code(architecture, shape, aligned=False)
    assert code.count(wide_load(architecture)) == 0 and code.count(BYTE_LOAD) > 0


def test_control_a_tile_too_wide_for_shared_memory_does_not_fit() -> None:
    shape = Tile(block_m=16, block_n=64, block_k=512, num_warps=4, num_stages=4)
    code = scaled_mm_code("sm_89", shape)
    assert code.shared > UNITS["sm_89"].largest and code.occupancy("sm_89", 4) == 0


def test_occupancy_is_what_llvm_estimates() -> None:
    """LLVM counts registers only: rows that LDS does not limit must agree."""
    compared = 0
    for architecture, row in ROWS:
        if architecture.startswith("gfx"):
            code = scaled_mm_code(architecture, row.tile)
            waves = int(code.text.rpartition("; Occupancy: ")[2].split()[0])
            share = code.occupancy(architecture, row.tile.num_warps)
            assert share <= waves / 16
            compared += share == waves / 16
    assert compared > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reduction_of_split_sums(architecture: str) -> None:
    types = {"sums_ptr": "*i32", "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": "*bf16"}
    types |= {"out_ptr": "*bf16", "M": "i32", "N": "i32"}
    constants = {"HAS_BIAS": True, "SPLIT_K": 3, "BLOCK_N": 256}
    multiples = tuple(name for name in types if name != "M")
    options: dict[str, object] = {"num_warps": 2, "enable_fp_fusion": False}
    code = compile_ahead(reduce_kernel, architecture, types, constants, multiples, options)
    assert code.spills == 0
    assert code.count(r"LDG\.E\S*\.128|(?:global|buffer)_load_b128") >= 3


@cache
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
