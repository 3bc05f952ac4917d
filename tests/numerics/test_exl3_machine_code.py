"""What EXL3's Triton kernels compile to, for GPUs that are not here: spills, matrix instructions, where weights go."""

from collections.abc import Iterator

import exl3_compiled as kernels
import pytest
from machine_code import UNITS, MachineCode

MATRIX = {
    "sm_90": r"\bHMMA\.16816\.F32\b",
    "sm_80": r"\bHMMA\.16816\.F32\b",
    "gfx1100": r"\bv_wmma_f32_16x16x16_f16\b",
    "gfx1201": r"\bv_wmma_f32_16x16x16_f16\b",
}
SOON = ("sm_90", "gfx1100")
ALL_WIDTHS = [(codebook, width) for codebook, width in kernels.FORMATS if codebook == "mul1"]
# Written to and read from shared memory by 16-bit pieces, or by fewer than 16 bytes.
AMD_PIECES = r"\bds_(?:load|store)_(?:u16|b16|b32|b64)"
NVIDIA_STORE = r"\bSTS|\bSTSM"


@pytest.fixture(autouse=True, scope="module")
def no_cached_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def check(architecture: str, code: MachineCode, num_warps: int) -> None:
    """Nothing spills, LDS suffices, and words are read by words."""
    assert code.spills == 0
    assert code.shared <= min(UNITS.get(architecture, UNITS["gfx1100"]).largest, 64 << 10)
    assert code.occupancy(architecture, num_warps) >= 0.25
    assert code.count(r"LDG\.E\.[US]8|(?:global|buffer)_load_(?:d16_)?(?:hi_)?[ui]8") == 0


def check_multiply(architecture: str, code: MachineCode) -> None:
    check(architecture, code, kernels.TILES)
    assert code.count(MATRIX[architecture]) > 0


@pytest.mark.parametrize("architecture", SOON)
def test_multiply(architecture: str) -> None:
    """NVIDIA: weights never go through shared memory, only the sums do. AMD: they go through LDS, 16 bytes at a time.

    Control: neither holds with the other's order of inputs.
    """
    code, other = (kernels.multiply(architecture, "mcg", 48, waves=waves) for waves in (None, architecture == "sm_90"))
    check_multiply(architecture, code)
    if architecture == "sm_90":
        assert 0 < 2 * code.count(NVIDIA_STORE) < other.count(NVIDIA_STORE)
    else:
        assert code.count(AMD_PIECES) < 32 < 64 <= other.count(AMD_PIECES)


@pytest.mark.parametrize("architecture", SOON)
def test_reconstruct(architecture: str) -> None:
    """Rows are stored 16 bytes a thread."""
    code = kernels.reconstruct(architecture, "mcg", 48)
    check(architecture, code, kernels.NUM_WARPS)
    assert code.count(r"STG\.E\.128|global_store_b128") >= 4


@pytest.mark.parametrize("architecture", ["gfx1100", pytest.param("sm_90", marks=pytest.mark.slow)])
def test_what_is_around(architecture: str) -> None:
    for code in (kernels.rotate(architecture), kernels.finish(architecture)):
        check(architecture, code, kernels.ROW_WARPS)
        assert code.count(r"LDG\.E\S*\.(?:64|128)|global_load_b(?:64|128)") > 0


@pytest.mark.parametrize("architecture", ["gfx1100", pytest.param("sm_90", marks=pytest.mark.slow)])
def test_search(architecture: str) -> None:
    """Squares are rounded before they are added, as by definition: no fused multiply-add with floats."""
    code = kernels.search_step(architecture, "mcg", 64)
    check(architecture, code, kernels.STEP_WARPS)
    assert code.count(r"\bFFMA\b|v_(?:dual_)?fmac?(?:ak|mk)?_f32") == 0
    assert code.count(r"\bFMUL\b|v_(?:dual_)?mul_f32|v_pk_mul_f32") > 0
    assert kernels.search_back(architecture, 64).spills == 0


@pytest.mark.slow
@pytest.mark.parametrize(("codebook", "width"), ALL_WIDTHS)
@pytest.mark.parametrize("architecture", SOON)
def test_every_width(architecture: str, codebook: str, width: int) -> None:
    check_multiply(architecture, kernels.multiply(architecture, codebook, width, two_groups=width % 32 == 0))
    if width in (24, 112):
        check(architecture, kernels.reconstruct(architecture, codebook, width), kernels.NUM_WARPS)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "gfx1201"])
def test_other_architectures(architecture: str) -> None:
    for codebook, width in (("3inst", 64), ("mul1", 56)):
        check_multiply(architecture, kernels.multiply(architecture, codebook, width))
    check(architecture, kernels.reconstruct(architecture, "3inst", 64), kernels.NUM_WARPS)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SOON)
def test_control_too_few_threads_spill(architecture: str) -> None:
    assert kernels.reconstruct(architecture, "mcg", 64, num_warps=2).spills > 0
