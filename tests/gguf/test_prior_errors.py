"""Errors of types without weights: against the real quantizers, and in the units of a measured table."""

import numpy as np
import pytest
from gemma4q_kernels.ggml import QUANTIZABLE_TYPES, GGMLQuantizationType, fallback
from gguf_files import BF16, F32, moe_26b_a4b, write_gguf
from llama_quantize import imatrix_of
from tolerances import PRIOR_ERROR, PRIOR_ERROR_OF_A_MODEL

from gguf_mixed.errors import InputError
from gguf_mixed.imatrix import Imatrix, ImatrixEntry
from gguf_mixed.measure import Sampling, measure
from gguf_mixed.prior_errors import prior_errors, relative_error
from gguf_mixed.sensitivity import Anchor, Sensitivity, TensorSensitivity, role_prior, uniform
from gguf_mixed.tensors import read_inventory

T = GGMLQuantizationType
PLAIN, EXPERTS = "blk.0.ffn_up.weight", "blk.0.ffn_down_exps.weight"
NEED_DATA = ("IQ1_S", "IQ2_XXS", "IQ2_XS")


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("qtype", QUANTIZABLE_TYPES, ids=lambda qtype: qtype.name)
def test_relative_errors_are_those_of_the_quantizers(quantizers, qtype, weighted):
    if qtype.name in NEED_DATA and not weighted:
        assert relative_error(qtype, False) == relative_error(qtype, True)
        return
    rows = np.random.default_rng(1).standard_normal((256, 1024), dtype=np.float32)
    difference = quantizers.round_trip(rows, qtype, np.ones(1024, np.float32) if weighted else None) - rows
    found = np.square(difference, dtype=float).sum() / np.square(rows, dtype=float).sum()
    expected = relative_error(qtype, weighted)
    assert found == pytest.approx(expected, rel=PRIOR_ERROR, abs=0)
    assert qtype is F32 or found != pytest.approx(1.1 * expected, rel=PRIOR_ERROR, abs=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Weights as the prior takes them to be."""
    listed = [(PLAIN, (256, 2048), BF16), (EXPERTS, (704, 128, 4), F32), ("output_norm.weight", (256,), F32)]
    return read_inventory(write_gguf(tmp_path_factory.mktemp("prior") / "m.gguf", listed, random_weights=True))


def flat(inventory):
    """An imatrix that weighs columns alike, and one expert's more than another's."""
    weights = {PLAIN: [3.0], EXPERTS: [1.0, 2.0, 3.0, 4.0]}
    lengths = {name: inventory.tensors[name].row_length for name in weights}
    return Imatrix(
        {
            name: ImatrixEntry(np.repeat(np.float32(values)[:, None], lengths[name], 1), np.ones(len(values), np.int64))
            for name, values in weights.items()
        }
    )


def anchored(at):
    return Sensitivity("test", True, lambda tensor: TensorSensitivity(anchor=Anchor(0.25, at)))


@pytest.mark.parametrize("data", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("source", ["none", "role prior", "at Q4_K"])
def test_in_the_units_of_a_measured_table(quantizers, model, data, source):
    types = [T.Q3_K, T.Q4_K, T.IQ4_NL, T.Q6_K, T.Q8_0]
    sensitivity = {"none": uniform(), "role prior": role_prior(model), "at Q4_K": anchored(T.Q4_K)}[source]
    imatrix = flat(model) if data else None
    measured = measure(model, quantizers, sensitivity, imatrix, types, Sampling(4096))
    prior = prior_errors(model, sensitivity, imatrix, types)
    assert [(row.tensor, row.qtype, row.n_bytes) for row in prior] == [
        (row.tensor, row.qtype, row.n_bytes) for row in measured
    ]
    ratios = np.array([row.error for row in prior]) / [row.error for row in measured]
    assert np.abs(ratios - 1).max() < PRIOR_ERROR_OF_A_MODEL
    assert np.abs(1.1 * ratios - 1).min() > PRIOR_ERROR_OF_A_MODEL


def test_rows_of_the_26b_a4b_that_take_blocks_of_32_only(tmp_path):
    inventory = read_inventory(write_gguf(tmp_path / "26b.gguf", moe_26b_a4b()))
    for imatrix in (None, imatrix_of(inventory)):
        table = prior_errors(inventory, role_prior(inventory), imatrix, QUANTIZABLE_TYPES)
        for name, tensor in inventory.tensors.items():
            types = {row.qtype for row in table.by_tensor.get(name, ())}
            legal = () if tensor.kept_because else tensor.legal_types
            assert types == {q for q in legal if imatrix is not None or not tensor.requires_imatrix(q)}
    asked = [T.IQ3_S, T.Q4_K, T.Q6_K]
    table = prior_errors(inventory, role_prior(inventory), None, asked)
    for name in ("blk.0.ffn_down.weight", "blk.0.ffn_down_exps.weight"):
        row_length = inventory.tensors[name].row_length
        assert {row.qtype for row in table.by_tensor[name]} == {fallback(qtype, row_length) for qtype in asked}


def test_a_type_of_the_source_loses_nothing(model):
    table = prior_errors(model, uniform(), types=[T.Q8_0, BF16, F32])
    errors = {(row.tensor, row.qtype): row.error for row in table}
    assert errors[PLAIN, BF16] == errors[EXPERTS, F32] == 0
    assert 0 < errors[EXPERTS, BF16] < errors[EXPERTS, T.Q8_0]


def refusal(inventory, sensitivity, imatrix=None, types=None):
    with pytest.raises(InputError) as raised:
        prior_errors(inventory, sensitivity, imatrix, types)
    return str(raised.value)


def test_refusals(model, tmp_path):
    rows = TensorSensitivity(rows=np.ones((1, 2048), np.float32))
    of_rows = Sensitivity("Fisher, 9 positions", True, lambda tensor: rows)
    assert refusal(model, of_rows) == (
        "m.gguf: holds no weights, only a header: sensitivity Fisher, 9 positions needs them"
    )
    other = Imatrix({"blk.9.x.weight": ImatrixEntry(np.ones((1, 4), np.float32), np.array([1]))})
    assert "imatrix is of another model" in refusal(model, uniform(), other)
    assert "rows of 256 without imatrix data" in refusal(model, uniform(), None, [T.IQ2_S])
    assert "F32, cannot be scaled" in refusal(model, anchored(F32))
    quantized = read_inventory(write_gguf(tmp_path / "q.gguf", [(PLAIN, (256, 8), T.Q8_0)]))
    assert "is Q8_0, expected F32, F16 or BF16" in refusal(quantized, uniform())
