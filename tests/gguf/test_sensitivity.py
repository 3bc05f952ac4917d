"""Sensitivities: the interface's checks, the role prior's order, and the import of measured tables."""

from pathlib import Path

import numpy as np
import pytest
from gemma4q_kernels.ggml import GGMLQuantizationType
from gguf_files import BF16, REAL_31B, moe_26b_a4b, write_gguf

from gguf_mixed.errors import InputError
from gguf_mixed.sensitivity import (
    NOISE_MARGIN,
    Anchor,
    TensorSensitivity,
    measured_table,
    role_prior,
    rows_of_matrix,
    uniform,
)
from gguf_mixed.tensors import Tensor, read_inventory

T = GGMLQuantizationType
REAL_TABLE = REAL_31B.with_name("thireus_kld_results.csv")
EXPERTS = Tensor("blk.0.ffn_down_exps.weight", (64, 8, 3), BF16, Path("m.gguf"), 0)
QUERY = Tensor("blk.0.attn_q.weight", (64, 8), BF16, Path("m.gguf"), 0)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return read_inventory(write_gguf(tmp_path_factory.mktemp("moe") / "m.gguf", moe_26b_a4b()))


def table_of(tmp_path, *lines):
    path = tmp_path / "kld.csv"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_marginals_are_per_expert():
    assert (rows_of_matrix(EXPERTS), rows_of_matrix(QUERY)) == (8, 8)
    TensorSensitivity(np.ones((3, 8), np.float32), np.ones((3, 64), np.float32), Anchor(0.0)).check(EXPERTS)
    TensorSensitivity().check(EXPERTS)


@pytest.mark.parametrize(
    ("sensitivity", "message"),
    [
        (TensorSensitivity(rows=np.ones((1, 8), np.float32)), r"rows \[1, 8\], expected \[3, 8\]"),
        (TensorSensitivity(columns=np.ones((3, 8), np.float32)), r"columns \[3, 8\], expected \[3, 64\]"),
        (TensorSensitivity(rows=np.full((3, 8), np.nan, np.float32)), "rows is negative or not finite"),
        (TensorSensitivity(columns=np.full((3, 64), -1, np.float32)), "columns is negative or not finite"),
        (TensorSensitivity(anchor=Anchor(-0.1)), "divergence of -0.1"),
        (TensorSensitivity(anchor=Anchor(float("nan"))), "divergence of nan"),
    ],
)
def test_marginals_that_cannot_be_are_refused(sensitivity, message):
    with pytest.raises(InputError, match=message):
        sensitivity.check(EXPERTS)


def test_no_knowledge_and_the_prior_say_that_nothing_was_measured(moe):
    assert (uniform().measured, role_prior(moe).measured, role_prior(moe).source) == (False, False, "role prior")


def test_role_prior_orders_roles_and_depths(moe):
    prior = role_prior(moe)

    def a_weight(name):
        tensor = moe.tensors[name]
        anchor = prior.of(tensor).anchor
        assert anchor is not None and anchor.at is None
        return anchor.nats / tensor.n_elements * moe.n_elements

    assert a_weight("blk.3.ffn_up.weight") == a_weight("blk.29.attn_q.weight") == pytest.approx(1)
    first, middle, last = (a_weight(f"blk.{layer}.ffn_down.weight") for layer in (9, 10, 20))
    assert first > last > middle > a_weight("blk.10.attn_output.weight") > 1
    assert a_weight("blk.10.ffn_down_exps.weight") == pytest.approx(middle)
    assert a_weight("token_embd.weight") > first
    assert sum(prior.of(tensor).anchor.nats for tensor in moe.tensors.values()) < 40


HEADER = "QTYPE,blk.0.attn_q.weight,blk.0.ffn_down_exps.weight"


def test_a_measured_table_anchors_at_its_coarsest_type(tmp_path):
    path = table_of(tmp_path, HEADER, "q8_0,0.001,-0.0001", "q4_K,0.05,0.01", "iq2_xxs,0.5,0.25")
    found = measured_table(path)
    assert found.measured and found.source == "measured at IQ2_XXS (kld.csv)"
    assert found.of(QUERY).anchor == Anchor(0.5, T.IQ2_XXS)
    assert found.of(EXPERTS).anchor == Anchor(0.25, T.IQ2_XXS)
    with pytest.raises(InputError, match="no divergence for tensor blk.1.x.weight"):
        found.of(Tensor("blk.1.x.weight", (64, 8), BF16, path, 0))


@pytest.mark.parametrize(("signal", "accepted"), [(NOISE_MARGIN * 1.01, True), (NOISE_MARGIN * 0.99, False)])
def test_noise_near_the_signal_is_refused(tmp_path, signal, accepted):
    path = table_of(tmp_path, HEADER, "q8_0,0.01,0.01", f"iq2_xxs,{signal / 100},{signal / 100}")
    if accepted:
        assert measured_table(path).of(QUERY).anchor.nats == signal / 100
        return
    with pytest.raises(InputError, match=f"0.01 at Q8_0: noise within {NOISE_MARGIN}x of the signal"):
        measured_table(path)
    forced = measured_table(path, force=True)
    assert forced.of(QUERY).anchor.nats == signal / 100 and "noise not checked" in forced.source


def test_a_table_without_a_noise_floor_is_refused(tmp_path):
    path = table_of(tmp_path, HEADER, "iq2_xxs,0.5,0.25")
    with pytest.raises(InputError, match="no Q8_0 row"):
        measured_table(path)
    assert measured_table(path, force=True).of(QUERY).anchor.nats == 0.5


@pytest.mark.skipif(not REAL_TABLE.exists(), reason="the published table of the 31B is not on this machine")
def test_the_published_table_of_the_31b_is_refused_unless_forced():
    with pytest.raises(InputError, match="no Q8_0 row"):
        measured_table(REAL_TABLE)
    forced = measured_table(REAL_TABLE, force=True)
    embeddings = Tensor("token_embd.weight", (5376, 262144), BF16, REAL_TABLE, 0)
    assert forced.of(embeddings).anchor == Anchor(1.65209296, T.IQ2_XXS)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "expected a first line QTYPE"),
        (("TYPE,a", "q4_K,1"), "expected a first line QTYPE"),
        (("QTYPE,a,a", "q4_K,1,2"), "distinct names"),
        ((HEADER, "q4_X,1,2"), "'q4_X' is not a type"),
        ((HEADER, "q4_K,1,much"), "much"),
        ((HEADER, "q4_K,1,inf"), "not finite"),
        ((HEADER, "q4_K,1"), "1 values for 2 tensors"),
        ((HEADER, "q4_K,1,2", "q4_K,1,2"), "a second time"),
        ((HEADER, "q8_0,1,2"), "no type coarser than Q8_0"),
    ],
)
def test_tables_that_cannot_be_are_refused(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        measured_table(table_of(tmp_path, *lines), force=True)


def test_a_table_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(InputError, match="none.csv: cannot be read"):
        measured_table(tmp_path / "none.csv")


def test_no_tensor_is_free(tmp_path):
    """What comes out at zero or below counts as the noise; without a row of noise, as the least that came out above."""
    path = table_of(tmp_path, HEADER, "q8_0,0.0005,0.0007", "q3_k,0.05,-0.0003")
    assert [measured_table(path).of(tensor).anchor.nats for tensor in (QUERY, EXPERTS)] == [0.05, pytest.approx(0.0006)]
    path = table_of(tmp_path, HEADER, "q3_k,0.05,0")
    assert measured_table(path, force=True).of(EXPERTS).anchor.nats == 0.05
    path = table_of(tmp_path, HEADER, "q8_0,0,0", "q3_k,0,0")
    with pytest.raises(InputError, match="median divergence 0 at the coarsest type"):
        measured_table(path)
    with pytest.raises(InputError, match=r"kld\.csv: no divergence is above zero"):
        measured_table(path, force=True)
