"""Allocation against exhaustive search, its constraints, and what it refuses."""

import itertools
import os

import pytest
from gemma4q_kernels.ggml import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_mixed import solver
from gguf_mixed.error_table import ErrorRow, ErrorTable
from gguf_mixed.errors import InputError
from gguf_mixed.solver import Constraints, solve

TYPES = [T.Q2_K, T.IQ3_S, T.IQ4_XS, T.Q5_K, T.Q8_0]
MILLION = 1_000_000


@st.composite
def tables(draw):
    """Up to five tensors of up to five types; sizes rise with the type, errors need not fall."""
    rows = []
    for index in range(draw(st.integers(1, 5))):
        n_types = draw(st.integers(1, len(TYPES)))
        sizes = sorted(draw(st.lists(st.integers(1, 900), min_size=n_types, max_size=n_types, unique=True)))
        errors = draw(st.lists(st.floats(0, 10), min_size=n_types, max_size=n_types))
        rows += [
            ErrorRow(f"blk.{index}.ffn_up.weight", qtype, size * MILLION, error)
            for qtype, size, error in zip(TYPES, sizes, errors, strict=False)
        ]
    return ErrorTable(rows)


def best_error(table, budget):
    totals = [
        sum(row.error for row in rows)
        for rows in itertools.product(*table.by_tensor.values())
        if sum(row.n_bytes for row in rows) <= budget
    ]
    return min(totals)


@settings(max_examples=60, deadline=None)
@given(tables(), st.floats(0, 1))
def test_no_worse_than_exhaustive_search(table, where):
    least = sum(min(row.n_bytes for row in rows) for rows in table.by_tensor.values())
    most = sum(max(row.n_bytes for row in rows) for rows in table.by_tensor.values())
    budget = int(least + where * (most - least))
    found = solve(table, budget)
    rows = {(row.tensor, row.qtype): row for row in table}
    chosen = [rows[tensor, qtype] for tensor, qtype in found.types.items()]
    assert found.n_bytes == sum(row.n_bytes for row in chosen) <= budget
    assert found.error == pytest.approx(sum(row.error for row in chosen))
    assert set(found.types) == set(table.by_tensor)
    held_back = budget - budget // 400_000
    best = best_error(table, held_back) if held_back >= least else float("inf")
    assert found.error <= best * (1 + 1e-3) + 1e-9
    assert found.error * (1 - found.gap) <= best + 1e-9


def model(layers=20):
    """A model of `layers` layers whose last layers matter most."""
    rows = []
    for layer in range(layers):
        for name, parameters in (("attn_q", 8), ("attn_k", 2), ("attn_v", 2), ("ffn_down", 30)):
            for rank, qtype in enumerate(TYPES):
                size = parameters * MILLION * (rank + 2)
                rows.append(ErrorRow(f"blk.{layer}.{name}.weight", qtype, size, parameters * (layer + 1) / 4**rank))
    return ErrorTable(rows)


def test_budget_is_used_to_a_thousandth():
    table = model()
    for budget in (3_000 * MILLION, 3_333 * MILLION, 4_321 * MILLION):
        found = solve(table, budget)
        assert 0.999 * budget <= found.n_bytes <= budget
        assert found.gap < 1e-3


def test_important_layers_get_more():
    found = solve(model(), 3_333 * MILLION)
    assert found.types["blk.19.ffn_down.weight"] > found.types["blk.0.ffn_down.weight"]


def test_constraints_hold():
    table = model()
    constraints = Constraints(
        pins={r"^blk\.3\.": T.Q8_0},
        floors={r"\.attn_": 4.0},
        uniform=(r"^blk\.(\d+)\.attn_[qkv]",),
    )
    found = solve(table, 3_800 * MILLION, constraints)
    assert {found.types[name] for name in table.by_tensor if name.startswith("blk.3.")} == {T.Q8_0}
    for layer in range(20):
        attention = {found.types[f"blk.{layer}.attn_{part}.weight"] for part in "qkv"}
        assert len(attention) == 1
        assert not attention & {T.Q2_K, T.IQ3_S}
    assert len({found.types[f"blk.{layer}.attn_q.weight"] for layer in range(20)}) > 1
    free = solve(table, 3_800 * MILLION)
    assert free.error < found.error


@pytest.mark.parametrize(
    ("budget", "constraints", "message"),
    [
        (1, Constraints(), r"budget: got 1 bytes, expected 1,680,000,000 \(the least possible\) to 5,040,000,000"),
        (5_000 * MILLION, Constraints(pins={"attn_q": T.Q6_K}), "blk.0.attn_q.weight: pinned to Q6_K"),
        (5_000 * MILLION, Constraints(floors={"ffn": 9.0}), "blk.0.ffn_down.weight: none of Q2_K, .* has the 9 bits"),
        (5_000 * MILLION, Constraints(floors={"fnn": 4.0}), "pattern fnn: matches no tensor"),
        (5_000 * MILLION, Constraints(uniform=("ffn(",)), "pattern ffn\\(: not a regular expression"),
    ],
)
def test_impossible_demands_are_named(budget, constraints, message):
    with pytest.raises(InputError, match=message):
        solve(model(), budget, constraints)


def test_bad_tables():
    row = ErrorRow("a", T.Q8_0, 1, 0.0)
    with pytest.raises(InputError, match="a: Q8_0 is in the error table twice"):
        ErrorTable([row, row])
    with pytest.raises(InputError, match="a: Q8_0: got error nan"):
        ErrorTable([ErrorRow("a", T.Q8_0, 1, float("nan"))])


def test_what_highs_prints_does_not_reach_standard_output(capfd, monkeypatch):
    """It prints at rare instances only, such as one of 2000 rows: here it prints at every one."""

    def talkative(*arguments, milp=solver.milp, **options):
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution\n")
        return milp(*arguments, **options)

    monkeypatch.setattr(solver, "milp", talkative)
    solve(model(), 3_800 * MILLION)
    print("result")
    assert capfd.readouterr().out == "result\n"
