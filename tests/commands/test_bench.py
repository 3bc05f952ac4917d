"""`gemma4q bench`: what it prints on this machine, and what its contenders compute. Not how fast anything is."""

import json
import math
from itertools import groupby

import pytest
import torch
from in_process import Finished, run
from tolerances import INT8_AGAINST_BF16

from vllm_gemma4q.benchmark.contenders import BASELINE, CONTENDERS, OURS, Contender, Linear, Weight
from vllm_gemma4q.benchmark.linear import QUICK, compare
from vllm_gemma4q.benchmark.shapes import Shape
from vllm_gemma4q.benchmark.timing import copies_beyond_cache, time_calls

CPU = torch.device("cpu")
NAMES = [contender.name for contender in CONTENDERS]


def bench(*arguments: str) -> Finished:
    return run("gemma4q", "bench", "--cpu", *arguments)


def test_json() -> None:
    finished = bench("--quick", "--json")
    assert finished.returncode == 0
    report = json.loads(finished.stdout)
    assert report["device"]["threads"] == torch.get_num_threads() and report["device"]["name"]
    assert report["versions"]["torch"]
    problems = [
        (key, list(group)) for key, group in groupby(report["rows"], key=lambda row: (row["n"], row["k"], row["m"]))
    ]
    assert len(problems) == 4
    for (n, k, m), group in problems:
        rows = {row["contender"]: row for row in group}
        assert list(rows) == NAMES
        for row in rows.values():
            if row["reason"]:
                assert row["seconds"] is None and row["ratio"] is None
                continue
            assert 1e-7 < row["seconds"] < 1
            assert math.isclose(row["tops"], 2 * m * n * k / row["seconds"] / 1e12)
            assert math.isclose(row["ratio"], rows[BASELINE]["seconds"] / row["seconds"])
            size = 2 if row["contender"] == BASELINE else 1
            assert math.isclose(row["gb_per_s"], size * n * k / row["seconds"] / 1e9)
            assert row["error"] <= INT8_AGAINST_BF16
        assert not rows[BASELINE]["reason"] and not rows[OURS]["reason"]


def test_table() -> None:
    finished = bench("--quick")
    assert finished.returncode == 0
    lines = finished.stdout.splitlines()
    assert sum(f"{OURS} few rows" in line for line in lines if "│" in line) == 4
    assert sum(OURS in line for line in lines if "│" in line) == 8
    assert any(line.startswith("not measured: vllm cutlass_scaled_mm: CUTLASS runs on NVIDIA") for line in lines)
    assert max(map(len, lines)) <= 140


def test_quick_takes_no_model() -> None:
    finished = bench("31B", "--quick")
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: --quick: got also MODEL")


@pytest.mark.parametrize("m", [1, 17])
def test_a_wrong_scale_would_show_as_an_error(m: int) -> None:
    """What the bound on errors is worth: each contender passes it, and none does with scales 1.1 times as large."""

    def scaled(contender: Contender) -> Contender:
        def prepare(weight: Weight) -> Linear:
            return contender.prepare(Weight(weight.bf16, weight.q, weight.scale * 1.1))

        return Contender(contender.name, contender.can_run, prepare)

    shape, wrong = [Shape(96, 320)], [CONTENDERS[0], *map(scaled, CONTENDERS[1:])]
    for contenders, passes in ((CONTENDERS, True), (wrong, False)):
        rows = [row for row in compare(shape, [m], CPU, QUICK, contenders) if not row.reason][1:]
        assert rows and all((row.error is not None and row.error <= INT8_AGAINST_BF16) is passes for row in rows)


def test_an_operator_that_fails_says_why() -> None:
    def refuse(weight: Weight) -> Linear:
        raise RuntimeError("no kernel\nfor this")

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not at this M")

    made = [Contender("a", CONTENDERS[0].can_run, refuse), Contender("b", CONTENDERS[0].can_run, lambda weight: fail)]
    rows = list(compare([Shape(32, 64)], [1], CPU, QUICK, [CONTENDERS[0], *made]))
    assert [row.reason for row in rows] == ["", "no kernel", "not at this M"]
    assert rows[0].ratio == 1.0


def test_times_are_of_calls_in_turn() -> None:
    called: list[int] = []
    found = time_calls([lambda: called.append(0), lambda: called.append(1)], CPU, 0.0)
    assert len(found) == 3 and called == [0, 0, 1, 0]  # the first is not timed
    assert all(seconds >= 0 for seconds in found)


def test_copies_exceed_the_cache() -> None:
    assert copies_beyond_cache(1 << 40, CPU) == 2
    assert copies_beyond_cache(1, CPU) > 2
