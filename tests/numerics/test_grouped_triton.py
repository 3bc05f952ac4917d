"""The grouped INT8 kernels: in Triton's interpreter, and what they compile to for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import interpreted_grouped
import pytest
from gemma4q_kernels.grouped_mm import tiles
from gemma4q_kernels.grouped_mm.triton import grouped_mm_kernel, sum_slots_kernel
from gemma4q_kernels.grouped_mm.triton_routing import CHUNK, STEP, count_kernel, most_blocks, place_kernel
from gemma4q_kernels.int8_scaled_mm.tiles import Row, Tile, packaged
from machine_code import UNITS, MachineCode, compile_ahead

WMMA, COPY = r"v_wmma_i32_16x16x16_iu8", r"(?:global|buffer)_load_b128"
BYTE_LOAD = r"LDG\.E\.[US]8|(?:global|buffer)_load_(?:d16_)?(?:hi_)?[ui]8"
MATRIX = {"sm_80": r"\bIMMA\.", "sm_89": r"\bIMMA\.", "sm_90": r"\bIG?MMA\b"}
WIDE_LOAD = dict.fromkeys(MATRIX, r"LDGSTS\.E\S*\.128")
FAST = ("sm_90", "gfx1100")
# N, K of w13 and w2 of Gemma 4 26B-A4B, at tensor parallelism 1, 2 and 4.
SHAPES = (((1408, 2816), (2816, 704)), ((704, 2816), (2816, 352)), ((352, 2816), (2816, 176)))


def rows() -> list[object]:
    """Every row of every table with each K it serves that compiles differently; common architectures first."""
    cases = []
    for name in packaged():
        for row in tiles.table(name).rows:
            for k in (704, 176) if row.max_k else (2816,):
                slow = name not in FAST or k == 176
                tile = row.tile
                label = f"{name}-{tile.block_m}x{tile.block_n}x{tile.block_k}-K{k}"
                cases.append(pytest.param(name, row, k, id=label, marks=[pytest.mark.slow] if slow else []))
    return cases


@pytest.fixture(autouse=True)
def no_cached_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def grouped_mm_code(architecture: str, tile: Tile, k: int, *, aligned: bool = True, **options: object) -> MachineCode:
    """w13 (K = 2816) or w2, as the launcher would compile it."""
    types = {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "w_ptr": "*i8", "w_scale_ptr": "*fp32", "weights_ptr": "*fp32"}
    types |= {"out_ptr": "*bf16"} | dict.fromkeys(("pairs_ptr", "block_experts_ptr", "block_rows_ptr"), "*i32")
    types |= dict.fromkeys(("num_blocks", "N", "K", "stride_xm", "stride_we", "stride_wn"), "i32")
    constants = {
        "PAIRS_A_ROW": 8 if k == 2816 else 1,
        "WEIGHTED": k != 2816,
        "EVEN_K": k % tile.block_k == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
    }
    multiples = tuple(name for name in types if name != "num_blocks") if aligned else ()
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False} | options
    return compile_ahead(grouped_mm_kernel, architecture, types, constants, multiples, options)


@pytest.mark.parametrize(("architecture", "row", "k"), rows())
def test_every_tile(architecture: str, row: Row, k: int) -> None:
    code = grouped_mm_code(architecture, row.tile, k)
    assert code.count(MATRIX.get(architecture, WMMA)) > 0
    if architecture == "sm_90" and row.tile.block_m >= 64:
        assert code.count(r"\bIGMMA\b") > 0  # of a whole warp group; smaller blocks have none
    assert code.count(WIDE_LOAD.get(architecture, COPY)) > 0
    assert code.count(BYTE_LOAD) == 0
    assert code.spills == 0
    assert 0 < code.shared <= UNITS[architecture].largest


def test_control_too_few_registers_spill() -> None:
    tile = Tile(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=2)
    assert grouped_mm_code("sm_80", tile, 704).spills == 0
    assert grouped_mm_code("sm_80", tile, 704, maxnreg=32).spills > 0


def test_control_unaligned_arguments_lose_the_wide_loads() -> None:
    tile = tiles.table("gfx1100").rows[0].tile
    code = grouped_mm_code("gfx1100", tile, 704, aligned=False)
    assert code.count(COPY) == 0 and code.count(BYTE_LOAD) > 0


@pytest.mark.parametrize(
    "architecture", ["gfx1100", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_90", "gfx1201"))]
)
def test_routing_and_sum_compile_without_spills(architecture: str) -> None:
    integers = {"ids_ptr": "*i32", "map_ptr": "*i32", "counts_ptr": "*i32", "GLOBAL_EXPERTS": "i32", "num_pairs": "i32"}
    routing = {"HAS_MAP": True, "EXPERTS": 128, "CHUNK": CHUNK, "STEP": STEP}
    options: dict[str, object] = {"num_warps": 4, "enable_fp_fusion": False}
    assert compile_ahead(count_kernel, architecture, integers, routing, (), options).spills == 0
    blocks = dict.fromkeys(("pairs_ptr", "block_experts_ptr", "block_rows_ptr"), "*i32") | {"num_blocks": "i32"}
    for one_chunk in (True, False):
        constants = routing | {"ONE_CHUNK": one_chunk, "BLOCK_M": 64}
        assert compile_ahead(place_kernel, architecture, integers | blocks, constants, (), options).spills == 0
    types = {"down_ptr": "*bf16", "ids_ptr": "*i32", "map_ptr": "*i32", "out_ptr": "*bf16"}
    types |= dict.fromkeys(("H", "stride_out", "GLOBAL_EXPERTS"), "i32")
    code = compile_ahead(
        sum_slots_kernel,
        architecture,
        types,
        {"HAS_MAP": True, "TOP_K": 8, "BLOCK": 1024},
        ("down_ptr", "out_ptr", "H", "stride_out"),
        options,
    )
    assert code.spills == 0 and code.count(r"LDG\.E\S*\.128|(?:global|buffer)_load_b128") >= 8


def test_tables_serve_every_batch() -> None:
    """Both multiplications of a layer agree in their blocks of pairs, at each size and on GPUs without a table."""
    assert {path.stem for path in tiles.CONFIGS.glob("*.json")} == set(packaged())
    for name in (*packaged(), "gfx942", "sm_120", "cpu"):
        for w13, w2 in SHAPES:
            for pairs in (1, 8, 9, 24, 25, 96, 97, 1 << 20):
                first, second = tiles.plan(name, pairs, w13, w2)
                assert first.block_m == second.block_m
                assert second.block_k == 64 and w13[1] % first.block_k == 0
    assert {row.tile.block_m for row in tiles.table("sm_90").rows} == {16, 32, 64, 128}


def test_bad_tables_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads((tiles.CONFIGS / "sm_89.json").read_text())
    folder = tmp_path / "grouped_mm"
    folder.mkdir()
    monkeypatch.setenv(tiles.OVERRIDE, str(tmp_path))
    tile = content["rows"][-1]["tile"]
    for number, (broken, message) in enumerate(
        (
            ([{"tile": tile, "split_k": 2}], r"rows.0.split_k: got 2, expected 1"),
            ([{"max_k": 1024, "tile": tile | {"block_m": 64}}, {"tile": tile}], "got block_m 128 .* and 64"),
        )
    ):
        name = f"sm_{90 + number}"
        (folder / f"{name}.json").write_text(json.dumps(content | {"architecture": name, "rows": broken}))
        with pytest.raises(ValueError, match=message):
            tiles.plan(name, 1, *SHAPES[0])


def test_blocks_suffice_for_any_routing() -> None:
    """The bound is reached: one pair in each expert, and all others in one of them."""
    for pairs, experts, block_m in ((8, 128, 16), (256, 128, 16), (32768, 98, 128), (5, 2, 16)):
        active = min(pairs, experts)
        worst = max(
            sum(-(-count // block_m) for count in [1] * (active - 1) + [pairs - active + 1]),
            active + (pairs - active) // block_m,
        )
        assert worst <= most_blocks(pairs, experts, block_m) <= worst + active


def test_kernels_in_the_interpreter() -> None:
    run_interpreted("fast")


@pytest.mark.slow
def test_kernels_in_the_interpreter_at_model_shapes() -> None:
    run_interpreted("wide")


def run_interpreted(selection: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(interpreted_grouped.__file__), selection]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [name for name, _ in interpreted_grouped.CHECKS[selection]]
