"""From a budget to a plan: the file lands just under the size asked for, on real shapes, and is valid as a table."""

import re

import pytest
from gemma4q_kernels.ggml import GGMLQuantizationType, bits_per_weight
from gguf_files import REAL_31B, gemma4_metadata, moe_26b_a4b, real_31b, small_moe, write_gguf

from gguf_mixed.allocation import default_types
from gguf_mixed.error_table import ErrorRow, ErrorTable
from gguf_mixed.errors import InputError
from gguf_mixed.overrides import override_table
from gguf_mixed.quantize import Job
from gguf_mixed.recipes.base import Material, quantizable
from gguf_mixed.recipes.optimal import Budget, optimal
from gguf_mixed.tensors import read_inventory

T = GGMLQuantizationType
TYPES = (T.IQ2_XS, T.IQ3_S, T.IQ4_NL, T.Q4_K, T.Q5_0, T.Q5_K, T.Q6_K, T.Q8_0)


def table_of(inventory):
    """An error that falls with every bit, and differs between tensors."""
    return ErrorTable(
        ErrorRow(tensor.name, qtype, tensor.bytes_as(qtype), tensor.n_elements * (1 + number % 7) * 4**-bits)
        for number, tensor in enumerate(quantizable(inventory))
        for qtype in TYPES
        if qtype in tensor.legal_types
        for bits in [bits_per_weight(qtype)]
    )


def models(folder):
    yield write_gguf(folder / "26b.gguf", moe_26b_a4b(), gemma4_metadata(30, 2816, 2112, 128))
    if REAL_31B.exists():
        yield write_gguf(folder / "31b.gguf", real_31b(), gemma4_metadata(60, 5376, 21504))


def test_the_file_lands_just_under_the_budget(tmp_path):
    for path in models(tmp_path):
        inventory = read_inventory(path)
        material, table = Material(inventory), table_of(inventory)
        wanted = inventory.n_elements * 5 // 8
        choice = optimal(material, table, Budget(file_bytes=wanted))
        job = Job(inventory, override_table(inventory, choice.types))
        assert 0.999 * wanted < job.file_bytes <= wanted
        choice = optimal(material, table, Budget(bpw=5))
        job = Job(inventory, override_table(inventory, choice.types))
        assert 4.995 < job.bpw <= 5
        assert T.IQ2_XS not in choice.types.values()  # it needs an imatrix, and there is none


def test_an_error_table_of_another_model(tmp_path):
    inventory = read_inventory(write_gguf(tmp_path / "m.gguf", small_moe()))
    listed = [(tensor.name, tensor.shape, tensor.qtype) for tensor in inventory.tensors.values()]
    # attn_output has rows of 100, which only floats fit
    rows = [*table_of(inventory)] + [
        ErrorRow(tensor.name, T.F16, tensor.bytes_as(T.F16), 0.0)
        for tensor in quantizable(inventory)
        if tensor.row_length == 100
    ]
    assert (
        optimal(Material(inventory), ErrorTable(rows), Budget(file_bytes=10**6)).types["blk.0.attn_output.weight"]
        is T.F16
    )
    with pytest.raises(InputError, match="tensor token_embd.weight is only in the model"):
        optimal(
            Material(inventory),
            ErrorTable(row for row in rows if row.tensor != "token_embd.weight"),
            Budget(file_bytes=10**6),
        )
    fewer = read_inventory(write_gguf(tmp_path / "f.gguf", [item for item in listed if item[0] != "token_embd.weight"]))
    with pytest.raises(InputError, match="tensor token_embd.weight is only in the error table"):
        optimal(Material(fewer), ErrorTable(rows), Budget(file_bytes=10**6))
    with pytest.raises(InputError, match="token_embd.weight: Q4_K does not fit it"):
        wrong = [row for row in rows if row.tensor != "token_embd.weight"]
        optimal(
            Material(inventory),
            ErrorTable([ErrorRow("token_embd.weight", T.Q4_K, 5, 1.0), *wrong]),
            Budget(file_bytes=10**6),
        )


def test_an_impossible_budget_says_the_least_and_the_most(tmp_path):
    inventory = read_inventory(write_gguf(tmp_path / "26b.gguf", moe_26b_a4b(), gemma4_metadata(30, 2816, 2112, 128)))
    material, table = Material(inventory), table_of(inventory)
    with pytest.raises(
        InputError, match=r"got 1 bpw, expected (\S+) bpw \(the least possible\) to (\S+) bpw"
    ) as caught:
        optimal(material, table, Budget(bpw=1))
    least, most = (float(word) for word in re.findall(r"(\S+) bpw \(", str(caught.value)))
    job = Job(inventory, override_table(inventory, optimal(material, table, Budget(bpw=least + 1e-3)).types))
    assert job.bpw == pytest.approx(least, abs=1e-3)
    job = Job(inventory, override_table(inventory, optimal(material, table, Budget(bpw=64)).types))
    assert job.bpw == pytest.approx(most, abs=1e-3)
    with pytest.raises(InputError, match=r"got a file of 10 bytes, expected a file of [\d,]+ bytes \(the least"):
        optimal(material, table, Budget(file_bytes=10))
    with pytest.raises(InputError, match="either"):
        Budget()


def test_types_that_are_slow_to_measure_are_for_small_budgets():
    assert T.IQ2_S in default_types(3.4) and T.IQ2_S not in default_types(3.5)
    assert set(default_types(3.4)) - set(default_types(8)) == {T.IQ2_S}
    assert not {T.IQ1_S, T.Q4_0, T.MXFP4} & set(default_types(0))
