"""The tile tables: what each file must be, which one serves an architecture, how K is divided."""

import json
from pathlib import Path
from typing import Any

import pytest
from gemma4q_kernels.int8_scaled_mm.tiles import CONFIGS, OVERRIDE, load, nearest, packaged, plan, table

TILE = {"block_m": 16, "block_n": 32, "block_k": 64, "num_warps": 4, "num_stages": 2}
VALID: dict[str, Any] = {
    "format": 1,
    "architecture": "gfx1100",
    "compute_units": 96,
    "provenance": {
        "gpu": "AMD Radeon RX 7900 XTX",
        "estimated": False,
        "date": "2026-11-21",
        "versions": {"triton": "3.9.0"},
        "method": "timed",
    },
    "rows": [{"max_m": 16, "split_k": "auto", "tile": TILE}, {"tile": {**TILE, "block_m": 64}}],
}
# Output and input widths of Gemma 4's layers at tensor parallel sizes 1, 2 and 4.
DECODING = [
    (16384, 5376),
    (5376, 8192),
    (43008, 5376),
    (5376, 2048),
    (2816, 4096),
    (2816, 2112),
    (1056, 2816),
    (352, 176),
]


def write(folder: Path, content: object, name: str = "gfx1100") -> Path:
    path = folder / f"{name}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("architecture", packaged())
def test_packaged_tables_are_valid_and_say_that_they_are_estimates(architecture: str) -> None:
    found, reason = table(architecture)
    assert found == load(CONFIGS / f"{architecture}.json") and reason == ""
    assert found.provenance.estimated and "not timed" in found.provenance.method


@pytest.mark.parametrize("architecture", packaged())
@pytest.mark.parametrize(("n", "k"), DECODING)
def test_decoding_shapes_occupy_the_gpu(architecture: str, n: int, k: int) -> None:
    """Each compute unit has a program, or each program has as few steps as are worth one."""
    found = table(architecture)[0]
    for m in (1, 16):
        tile, splits = found.plan(m, n, k)
        steps = -(-k // tile.block_k)
        programs = -(-n // tile.block_n) * splits
        assert tile.block_m == 16 and 1 <= splits <= steps
        assert programs >= found.compute_units or steps // (splits + 1) < 4
        assert splits == 1 or programs < 2 * found.compute_units  # the second launch bought something


def test_the_first_row_that_fits_is_used(tmp_path: Path) -> None:
    wide, narrow = {**TILE, "block_n": 128}, {**TILE, "block_n": 16}
    rows = [{"max_m": 16, "max_n": 100, "tile": narrow}, {"max_m": 16, "max_k": 200, "tile": wide}, {"tile": TILE}]
    found = load(write(tmp_path, {**VALID, "rows": rows}))
    assert [found.plan(*size)[0].block_n for size in ((16, 100, 999), (1, 101, 200), (1, 101, 201), (17, 1, 1))] == [
        16,
        128,
        32,
        32,
    ]


def test_parts_of_k(tmp_path: Path) -> None:
    found = load(write(tmp_path, VALID))
    assert found.plan(1, 96 * 32, 5376)[1] == 1  # a program for each of 96 units
    assert found.plan(1, 95 * 32, 5376)[1] == 2
    assert found.plan(1, 32 * 32, 5376)[1] == 3
    assert found.plan(1, 32, 704)[1] == 2  # 11 steps, at least 4 a part
    assert found.plan(1, 32, 1)[1] == 1
    assert found.plan(17, 32, 5376)[1] == 1  # the row does not divide
    fixed = load(write(tmp_path, {**VALID, "rows": [{"split_k": 8, "tile": TILE}]}))
    assert (fixed.plan(1, 64, 5376)[1], fixed.plan(1, 64, 176)[1]) == (8, 3)


def changed(*keys: str | int, value: object) -> dict[str, Any]:
    """VALID with one value replaced or added."""
    content = json.loads(json.dumps(VALID))
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed("rows", 1, "tile", "block_n", value=48), r"rows\.1\.tile\.block_n: .*power of two"),
        (changed("rows", 1, "tile", "block_n", value=8), r"rows\.1\.tile\.block_n: .*greater than or equal to 16"),
        (changed("rows", 0, "tile", "waves", value=2), r"rows\.0\.tile\.waves: Extra inputs"),
        (changed("rows", 0, "max_m", value="16"), r"rows\.0\.max_m: .*valid integer"),
        (changed("rows", 0, "split_k", value="all"), r"rows\.0\.split_k"),
        (changed("rows", 0, "max_m", value=None), r"rows\.1 is never reached: rows\.0 covers"),
        (changed("rows", 1, "max_n", value=64), r"rows\.1 has a limit"),
        (changed("rows", value=[]), r"rows: .*at least 1 item"),
        (changed("format", value=2), r"format: Input should be 1"),
        (changed("architecture", value="gfx1101"), r"architecture: got 'gfx1101', expected 'gfx1100'"),
        (changed("compute_units", value=0), r"compute_units: .*greater than or equal to 1"),
        (changed("provenance", "date", value="21.11.2026"), r"provenance\.date: .*Invalid isoformat"),
        (changed("provenance", "estimated", value="no"), r"provenance\.estimated: .*valid boolean"),
        ({key: value for key, value in VALID.items() if key != "provenance"}, r"provenance: Field required"),
        ("{", r"Invalid JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_deviates_is_one_error(tmp_path: Path, content: object, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gfx1100\.json: No such file"):
        load(tmp_path / "gfx1100.json")


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("gfx1102", "gfx1101"), ("gfx1200", "gfx1201"), ("sm_86", "sm_89"), ("sm_100", "sm_90"), ("sm_120", "sm_89")],
)
def test_relatives_borrow_a_table_and_say_so(architecture: str, name: str) -> None:
    found, reason = table(architecture)
    assert found.architecture == name
    assert architecture in reason and name in reason


@pytest.mark.parametrize("architecture", ["gfx942", "cpu"])
def test_strangers_borrow_a_table_and_say_so(architecture: str) -> None:
    assert nearest(architecture)[0] in packaged()
    assert f"no tile table for the family of {architecture}" in table(architecture)[1]


def test_the_users_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged_plan = plan("gfx1100", 1, 64, 5376)
    monkeypatch.setenv(OVERRIDE, str(tmp_path))
    path = write(tmp_path, VALID)
    found, reason = table("gfx1100")
    assert found == load(path) and str(path) in reason and OVERRIDE in reason
    assert plan("gfx1100", 1, 64, 5376) == found.plan(1, 64, 5376) != packaged_plan
    assert table("sm_90")[1] == ""  # not in that folder: the packaged one
    write(tmp_path, {**VALID, "architecture": "gfx1102"}, "gfx1102")
    assert table("gfx1102")[0].architecture == "gfx1102"  # its own file goes before a relative's
    monkeypatch.setenv(OVERRIDE, str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=rf"{OVERRIDE}: got .*missing', expected a folder"):
        table("gfx1100")
