"""`gemma4q tune`: the search on times given as data, what compiles, the interpreter's run, and no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gemma4q_kernels.int8_scaled_mm.tiles import Row, Tile, TileTable, load
from triton.backends.compiler import GPUTarget

from vllm_gemma4q.benchmark.candidates import DENSE, EXPERTS, Band, choices, tiles
from vllm_gemma4q.benchmark.compiled import compiled
from vllm_gemma4q.benchmark.search import Choice, Problem, Times, rows_of, slowdowns
from vllm_gemma4q.benchmark.shapes import Experts, Shape, sizes_of
from vllm_gemma4q.benchmark.tune import make_table, write_table
from vllm_gemma4q.errors import InputError

HERE = Path(__file__).parent
GFX1100 = GPUTarget("hip", "gfx1100", 32)
SM_90 = GPUTarget("cuda", 90, 32)


def tile(block_m: int = 16, block_n: int = 64, **other: int) -> Tile:
    return Tile(**{"block_m": block_m, "block_n": block_n, "block_k": 64, "num_warps": 4, "num_stages": 2, **other})


A, B, C = Choice(tile(block_n=32), 1), Choice(tile(block_n=64), 1), Choice(tile(block_n=128), "auto")
SMALL, LARGE = (1, 1024, 512), (1, 8192, 512)


def times(*rows: tuple[tuple[int, int, int], dict[Choice, float]]) -> Times:
    return {Problem(*problem): by_choice for problem, by_choice in rows}


def summary(rows: tuple[Row, ...]) -> list[tuple[int | None, int | None, int | None, Choice]]:
    return [(row.max_m, row.max_n, row.max_k, Choice(row.tile, row.split_k)) for row in rows]


def test_the_fastest_choice_of_each_band_gets_a_row() -> None:
    found = times((SMALL, {A: 1.0, B: 2.0}), ((64, 1024, 512), {A: 3.0, B: 2.0}), ((999, 1024, 512), {A: 9.0, C: 2.0}))
    assert summary(rows_of(found, (16, 64, None))) == [(16, None, None, A), (64, None, None, B), (None, None, None, C)]


def test_a_cut_has_to_pay() -> None:
    worth = times((SMALL, {A: 1.0, B: 1.5}), (LARGE, {A: 1.5, B: 1.0}))
    assert summary(rows_of(worth, (None,))) == [(None, 1024, None, A), (None, None, None, B)]
    noise = times((SMALL, {A: 1.0, B: 1.01}), (LARGE, {A: 1.02, B: 1.0}))
    assert summary(rows_of(noise, (None,))) == [(None, None, None, B)]


def test_a_cut_at_k_and_one_within_another() -> None:
    by_k = times(((1, 512, 512), {A: 1.0, B: 2.0}), ((1, 512, 2048), {A: 2.0, B: 1.0}))
    assert summary(rows_of(by_k, (None,))) == [(None, None, 512, A), (None, None, None, B)]
    three = times(
        (SMALL, {A: 1.0, B: 2.0, C: 3.0}),
        ((1, 4096, 512), {A: 3.0, B: 1.0, C: 2.0}),
        (LARGE, {A: 3.0, B: 2.0, C: 1.0}),
    )
    assert summary(rows_of(three, (None,))) == [(None, 1024, None, A), (None, 4096, None, B), (None, None, None, C)]


def test_small_problems_count_like_large_ones() -> None:
    """B wins 0.4 ms where A wins 1 us; what is lost of each problem's own time decides."""
    found = times((SMALL, {A: 1e-6, B: 2e-6}), (LARGE, {A: 4.4e-3, B: 4e-3}))
    one_row = {problem: dict(by_choice) for problem, by_choice in found.items()}
    assert slowdowns(one_row, [Row(tile=A.tile)]) == pytest.approx({Problem(*SMALL): 1.0, Problem(*LARGE): 1.1})
    assert summary(rows_of(found, (None,)))[0] == (None, 1024, None, A)


def test_rows_that_change_nothing_are_dropped() -> None:
    same = times((SMALL, {A: 1.0, B: 2.0}), ((64, 1024, 512), {A: 1.0, B: 2.0}))
    assert summary(rows_of(same, (16, None))) == [(None, None, None, A)]
    both = {A: 1.0, B: 1.5}, {A: 1.5, B: 1.0}
    bands = times((SMALL, both[0]), (LARGE, both[1]), ((64, 1024, 512), both[0]), ((64, 8192, 512), both[1]))
    assert summary(rows_of(bands, (16, None))) == [(None, 1024, None, A), (None, None, None, B)]


def test_a_choice_that_cannot_run_somewhere_is_not_chosen_there() -> None:
    found = times((SMALL, {A: 1.0, B: 1.1}), (LARGE, {B: 1.0}))
    assert summary(rows_of(found, (None,))) == [(None, 1024, None, A), (None, None, None, B)]
    nowhere = times(((1, 512, 512), {A: 1.0}), ((1, 512, 512 + 64), {}))
    with pytest.raises(ValueError, match="no choice that runs all of"):
        rows_of(nowhere, (None,))


def test_experts_share_their_rows() -> None:
    """Each half would take other rows for itself; together 16 loses less."""
    few, few_too, many = Choice(tile(16), 1), Choice(tile(16, 128), 1), Choice(tile(32), 1)
    w13, w2 = (8, 1408, 2816), (8, 2816, 704)
    found = times((w13, {few: 1.1, few_too: 1.5, many: 1.0}), (w2, {few: 1.4, few_too: 1.0, many: 1.3}))
    rows = rows_of(found, (None,), one_block_m=True)
    assert {row.tile.block_m for row in rows} == {16}
    assert [Choice(row.tile, row.split_k) for row in rows] == [few, few_too]
    assert {row.tile.block_m for row in rows_of(found, (None,))} == {16, 32}


@pytest.mark.parametrize("limits", [(), (16,), (None, 16), (64, 16, None), (16, 16, None)])
def test_limits_that_make_no_bands(limits: tuple[int | None, ...]) -> None:
    with pytest.raises(ValueError, match="expected ascending numbers and None"):
        rows_of(times((SMALL, {A: 1.0})), limits)


def test_the_last_band_needs_a_problem() -> None:
    with pytest.raises(ValueError, match="no problem with M > 16"):
        rows_of(times((SMALL, {A: 1.0})), (16, None))


def test_tables_are_written_as_they_are_read(tmp_path: Path) -> None:
    found = times((SMALL, {A: 1.0, C: 2.0}), ((64, 1024, 512), {A: 2.0, C: 1.0}))
    bands = (Band(16, (1,), (16,)), Band(None, (64,), (16,)))
    facts = {"architecture": "gfx1100", "compute_units": 96, "gpu": "made up", "versions": {"triton": "3.9.0"}}
    table = make_table(found, bands, False, **facts)
    path = write_table(tmp_path / "new", table)
    assert load(path) == table and path.name == "gfx1100.json"
    assert not table.provenance.estimated and "4 timings at 2 problems" in table.provenance.method
    assert [path.name for path in path.parent.iterdir()] == ["gfx1100.json"]
    assert table.plan(1, 1024, 512) == (A.tile, 1) and table.plan(17, 64, 512)[0] == C.tile


@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize("bands", [DENSE, EXPERTS])
def test_candidates_are_dozens_and_include_what_is_in_use(bands: tuple[Band, ...], amd: bool) -> None:
    in_use = (Row(max_k=704, tile=tile(block_n=16)), Row(tile=tile(block_n=512), split_k=3))
    for band in bands:
        found = choices(band, amd, in_use, [Problem(m, 2816, k) for m in band.timed for k in (704, 2816)])
        assert found[:2] == [Choice(in_use[0].tile, 1), Choice(in_use[1].tile, 3)]
        assert 10 <= len(found) == len(set(found)) <= 70
        assert {choice.split_k for choice in found[2:]} == ({1, "auto"} if band.splits else {1})


@pytest.mark.parametrize(("target", "grouped"), [(GFX1100, False), (SM_90, True)], ids=["gfx1100", "sm_90"])
def test_what_spills_is_not_timed(target: GPUTarget, grouped: bool) -> None:
    good = compiled(tile(64, 64), target, grouped)
    assert good is not None and good.spills == 0 and good.shared > 0
    assert good.fits(64 << 10) and not good.fits(good.shared - 1)
    bad = compiled(tile(128, 128, num_warps=2), target, grouped)
    assert bad is not None and bad.spills and not bad.fits(1 << 20)


def test_every_size_of_a_tile_has_candidates() -> None:
    for band in (*DENSE, *EXPERTS):
        assert all(list(tiles(block_m, amd)) for block_m in band.block_m for amd in (True, False))


def test_sizes_of_the_published_models() -> None:
    """Those of the specification, one rank's share, K loaded twice where V is K."""
    assert {(s.n, s.k) for s in sizes_of("31B").linears} == {
        *((16384, 5376), (5376, 8192), (20480, 5376), (5376, 16384), (43008, 5376), (5376, 21504))
    }
    found = sizes_of("26B-A4B", 4)
    assert {(s.n, s.k) for s in found.linears} == {
        *((2048, 2816), (2816, 1024), (3072, 2816), (2816, 2048), (1056, 2816), (2816, 528))
    }
    assert found.experts == (Experts(128, 8, 2816, 176),)
    assert Shape(16384, 5376, "qkv sliding") in sizes_of(None).linears


def test_sizes_of_a_checkpoint(tmp_path: Path) -> None:
    small = HERE.parents[1] / "examples" / "small_gemma4" / "moe"
    found = sizes_of(str(small))
    assert found == sizes_of(str(small / "config.json")) and found.linears and found.experts
    for model, message in ((str(tmp_path), "No such file"), ("27B", "expected a checkpoint folder or 31B, 26B-A4B")):
        with pytest.raises(InputError, match=message):
            sizes_of(model)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(InputError, match="not JSON"):
        sizes_of(str(tmp_path))
    with pytest.raises(InputError, match="-tp 3: num_attention_heads = 32 does not divide among 3 ranks"):
        sizes_of("31B", 3)


def test_tune_without_a_gpu_is_one_line(tmp_path: Path) -> None:
    gemma4q = Path(sys.executable).with_name("gemma4q")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [gemma4q, "tune", "31B", "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: tune: no GPU") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tuning_in_the_interpreter(tmp_path: Path) -> None:
    """From candidates to files that the kernels load, with the interpreter's times; wrong sums are refused."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "interpreted_tune.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("dense ") and lines[1].startswith("experts ")
    assert "refused: block_m=16" in lines[2] and "other sums than float64's" in lines[2]
    for path in (tmp_path / "cpu.json", tmp_path / "grouped_mm" / "cpu.json"):
        assert isinstance(load(path), TileTable)
        assert json.loads(path.read_text())["provenance"]["gpu"] == "Triton's interpreter"
