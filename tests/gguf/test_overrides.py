"""Override tables: what the patterns match, reading them back, and what is refused."""

import re

import pytest
from gemma4q_kernels.ggml import QUANTIZABLE_TYPES, GGMLQuantizationType
from gguf_files import small_moe, write_gguf
from hypothesis import given
from hypothesis import strategies as st

from gguf_mixed.errors import InputError
from gguf_mixed.overrides import OverrideTable, override_table, parse_overrides, read_overrides
from gguf_mixed.tensors import read_inventory

T = GGMLQuantizationType
NAMES = st.text("abz019._-^$*+?()[]{}|\\/<>#", min_size=1, max_size=12)
TABLES = st.dictionaries(NAMES, st.sampled_from(QUANTIZABLE_TYPES), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def inventory(tmp_path_factory):
    return read_inventory(write_gguf(tmp_path_factory.mktemp("model") / "model.gguf", small_moe()))


def everything(inventory, qtype):
    return {tensor.name: qtype for tensor in inventory.tensors.values() if not tensor.kept_because}


def test_the_form_that_llama_quantize_reads():
    table = OverrideTable({"blk.0.attn_q.weight": T.IQ4_NL, "token_embd.weight": T.Q5_K})
    assert table.text == "^blk\\.0\\.attn_q\\.weight$=iq4_nl\n^token_embd\\.weight$=q5_k\n"


@given(TABLES)
def test_every_pattern_matches_its_tensor_and_no_other(types):
    for line, own in zip(OverrideTable(types).lines, types, strict=True):
        pattern = line.rpartition("=")[0]
        assert [name for name in types if re.search(pattern, name)] == [own]
        assert not re.search(pattern, f"x{own}") and not re.search(pattern, f"{own}x")


@given(TABLES)
def test_a_table_reads_back_as_it_was_written(types):
    text = OverrideTable(types).text
    parsed = parse_overrides(text, "table.txt")
    assert list(parsed.types.items()) == list(types.items())
    assert parsed.text == text


@pytest.mark.parametrize("name", ["blk.0.attn q.weight", "a=b.weight", "blk.0.Attn.weight", "a\nb"])
def test_names_that_no_pattern_can_carry(name):
    with pytest.raises(InputError, match="no override can name it"):
        OverrideTable({name: T.Q4_K})


def test_types_that_do_not_fit_are_listed_as_written(inventory):
    table = override_table(inventory, everything(inventory, T.Q4_K))
    assert table.types["blk.0.ffn_down_exps.weight"] is T.Q5_0
    assert table.types["blk.0.attn_output.weight"] is T.F16
    assert table.types["blk.1.ffn_up.weight"] is T.Q4_K


def test_order_does_not_depend_on_the_order_of_the_assignment(tmp_path):
    listed = [(f"blk.{layer}.attn_q.weight", (256, 4), T.BF16) for layer in (0, 10, 2)]
    inventory = read_inventory(write_gguf(tmp_path / "m.gguf", [*listed, ("token_embd.weight", (256, 4), T.BF16)]))
    types = everything(inventory, T.Q4_K)
    table = override_table(inventory, dict(reversed(types.items())))
    assert table.text == override_table(inventory, types).text
    assert list(table.types) == [
        "token_embd.weight", "blk.0.attn_q.weight", "blk.2.attn_q.weight", "blk.10.attn_q.weight",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.0.ffn_up.weight": None}, "tensor blk.0.ffn_up.weight: no type assigned .1 tensors of model.gguf."),
        ({"token_embd.weight": None}, "tensor token_embd.weight: no type assigned"),
        ({"blk.0.attn_norm.weight": T.Q8_0}, "attn_norm.weight: assigned a type, but is never quantized .1-D."),
        ({"blk.9.ffn_up.weight": T.Q8_0}, "blk.9.ffn_up.weight: assigned a type, but model.gguf has no such tensor"),
    ],
)
def test_exactly_the_quantizable_tensors_are_listed(inventory, change, message):
    types = everything(inventory, T.Q4_K) | change
    with pytest.raises(InputError, match=message):
        override_table(inventory, {name: qtype for name, qtype in types.items() if qtype is not None})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# made by hand\n", "t:1: a comment: llama-quantize stops at it"),
        ("^a$=q4_k\n\n", "t:2: got '', expected one tensor"),
        ("attn_q=q4_k\n", "t:1: got 'attn_q=q4_k', expected one tensor"),
        ("^a.weight$=q4_k\n", "t:1: got .*, expected one tensor"),
        ("^a$=q4_k ^b$=q4_k\n", "t:1: got .*, expected one tensor"),
        ("^a$=q4_k\n^a$=q5_k\n", "t:2: tensor a is listed twice"),
        ("^a$=q4_9\n", "t:1: tensor a: 'q4_9' is not a type a model can be quantized to"),
        ("", "t: an empty override table"),
    ],
)
def test_tables_that_llama_quantize_would_read_otherwise(text, message):
    with pytest.raises(InputError, match=message):
        parse_overrides(text, "t")


def test_unreadable_tables(tmp_path):
    with pytest.raises(InputError, match="none.txt: cannot be read: No such file"):
        read_overrides(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="binary: cannot be read: not UTF-8 text"):
        read_overrides(tmp_path / "binary")
