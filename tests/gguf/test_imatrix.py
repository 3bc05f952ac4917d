"""Importance matrices: both file formats, slicing, and agreement with llama.cpp's own reading."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf_files import BF16, F32, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from llama_quantize import IMATRIX, OUTPUT, imatrix_of, run, small_model

from gguf_mixed.errors import InputError
from gguf_mixed.imatrix import Imatrix, ImatrixEntry
from gguf_mixed.imatrix_gguf import UNKNOWN_DATASET, read_imatrix, write_imatrix
from gguf_mixed.imatrix_legacy import write_legacy
from gguf_mixed.tensors import read_inventory

# Made by llama-imatrix (b11434) with -c 128 --chunks 4 --process-output on the small Gemma 4 MoE of examples/, and the
# hash of what the same run writes with --output-format dat.
REAL = Path(__file__).with_name("llama_imatrix_b11434.gguf")
REAL_LEGACY_SHA256 = "30b94cfa95304e9c7f7ba1bee86371c5b7638befd8a802149265663eda507091"
EXPERTS = "blk.0.ffn_down_exps.weight"
NAMES = st.from_regex(r"blk\.[0-9]{1,2}\.[a-z_]{1,20}\.weight", fullmatch=True)


@st.composite
def entries(draw, most_matrices=5):
    shape = draw(st.tuples(st.integers(1, most_matrices), st.integers(1, 8)))
    sums = draw(hnp.arrays(np.float32, shape, elements=st.floats(0, 2.0**60, width=32)))
    totals = draw(st.none() | hnp.arrays(np.float32, shape, elements=st.floats(-(2.0**50), 2.0**50, width=32)))
    counts = draw(hnp.arrays(np.int64, shape[:1], elements=st.integers(0, 2**24)))
    return ImatrixEntry(sums, counts, totals)


IMATRICES = st.builds(
    Imatrix,
    st.dictionaries(NAMES, entries(), min_size=1, max_size=4),
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1, max_size=3).map(tuple),
    st.integers(0, 2**31 - 1),
    st.integers(1, 2**31 - 1),
)


def entry(*counts, row=4):
    shape = (len(counts), row)
    return ImatrixEntry(np.arange(len(counts) * row, dtype=np.float32).reshape(shape), np.array(counts))


@settings(deadline=None, max_examples=60)
@given(IMATRICES)
def test_gguf_round_trip(tmp_path_factory, imatrix):
    path = tmp_path_factory.mktemp("imatrix") / "i.gguf"
    write_imatrix(imatrix, path)
    assert read_imatrix(path) == imatrix
    assert list(path.parent.iterdir()) == [path]


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, entries(), min_size=1, max_size=4), st.integers(1, 512), st.integers(0, 30))
def test_legacy_files_keep_the_weights(tmp_path_factory, found, chunk_size, doublings):
    """With a power of two of calls no rounding is involved, so the weights come back bit for bit."""
    largest = chunk_size * 2**doublings
    whole = {}
    for name, item in found.items():
        counts = np.minimum(item.counts, largest)
        counts[0] = largest
        whole[name] = ImatrixEntry(item.sums, counts, item.totals)
    path = tmp_path_factory.mktemp("imatrix") / "i.dat"
    assert write_legacy(Imatrix(whole, ("text",), 5, chunk_size), path) == ()
    read = read_imatrix(path)
    assert (read.datasets, read.chunk_count, read.chunk_size) == (("text",), 5, None)
    for name, item in whole.items():
        assert np.array_equal(read.entries[name].weights.ravel(), item.weights.ravel())
        assert read.entries[name].counts.tolist() == [2**doublings]
    again = path.with_name("again.dat")
    write_legacy(read, again)
    assert again.read_bytes() == path.read_bytes()


def test_legacy_files_leave_out_what_saw_nothing(tmp_path):
    imatrix = Imatrix({"a.weight": entry(0, 0), "b.weight": entry(512, 0)}, (), 1, 512)
    assert write_legacy(imatrix, tmp_path / "i.dat") == ("a.weight",)
    read = read_imatrix(tmp_path / "i.dat")
    assert list(read.entries) == ["b.weight"]
    assert read.entries["b.weight"].weights[0, 4:].tolist() == [1, 1, 1, 1]  # the expert without data


def test_weights_are_those_of_llama_quantize():
    item = entry(3, 0, 7)
    expected = [[np.float32(value) / np.float32(3) for value in range(4)], [1] * 4]
    expected.append([np.float32(value) / np.float32(7) for value in range(8, 12)])
    assert np.array_equal(item.weights, np.array(expected, np.float32))
    assert item.never_used == (1,)


@given(entries(), st.data())
def test_slicing_keeps_the_chosen_matrices(item, data):
    keep = data.draw(st.permutations(range(len(item.counts))).map(lambda ids: ids[: max(1, len(ids) // 2)]))
    sliced = item.slice(keep)
    assert np.array_equal(sliced.sums, item.sums[keep])
    assert sliced.counts.tolist() == [item.counts[index] for index in keep]
    assert np.array_equal(sliced.weights, item.weights[keep])
    assert item.slice(range(len(item.counts))) == item


def test_slicing_an_entry_with_one_count_for_all(tmp_path):
    """A legacy file, which lost the counts of single experts."""
    write_legacy(Imatrix({EXPERTS: entry(512, 512, 512)}, (), 1, 512), tmp_path / "i.dat")
    sliced = read_imatrix(tmp_path / "i.dat").slice_experts(lambda _: [0, 2], 3).entries[EXPERTS]
    assert sliced.sums.tolist() == [[value / 512 for value in [*range(4), *range(8, 12)]]]
    assert sliced.counts.tolist() == [1]


def test_slicing_leaves_other_tensors_alone():
    imatrix = Imatrix({EXPERTS: entry(1, 2, 3), "blk.0.attn_q.weight": entry(9)}, ("x",), 4, 5)
    sliced = imatrix.slice_experts(lambda name: [2] if "exps" in name else None, 3)
    assert sliced.entries["blk.0.attn_q.weight"] is imatrix.entries["blk.0.attn_q.weight"]
    assert sliced.entries[EXPERTS].counts.tolist() == [3]
    assert (sliced.datasets, sliced.chunk_count, sliced.chunk_size) == (("x",), 4, 5)


@pytest.mark.parametrize("keep", [[3], [-1], [0, 0], []])
def test_experts_that_cannot_be_kept(keep):
    imatrix = Imatrix({EXPERTS: entry(1, 2, 3)})
    with pytest.raises(InputError, match=f"tensor {EXPERTS}: cannot keep .* of 3 matrices"):
        imatrix.slice_experts(lambda _: keep, 3)


def test_an_entry_that_does_not_divide():
    with pytest.raises(InputError, match="sums .* do not divide into 3 matrices"):
        Imatrix({EXPERTS: entry(1, row=4)}).slice_experts(lambda _: [0], 3)


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [
        ([[1, np.nan]], [1], "negative or not finite"),
        ([[1, np.inf]], [1], "negative or not finite"),
        ([[1, -1]], [1], "negative or not finite"),
        ([[1, 1]], [-1], "a count is negative"),
        ([[1, 1]], [1, 1], "do not fit together"),
        ([[]], [1], "do not fit together"),
    ],
)
def test_impossible_entries(sums, counts, message):
    with pytest.raises(InputError, match=message):
        ImatrixEntry(np.array(sums, np.float32), np.array(counts))


@pytest.fixture
def inventory(tmp_path):
    listed = [(EXPERTS, (4, 2, 3), F32), ("blk.0.attn_q.weight", (4, 2), BF16), ("token_embd.weight", (4, 9), BF16)]
    return read_inventory(write_gguf(tmp_path / "model.gguf", [*listed, ("output_norm.weight", (4,), F32)]))


def test_matching_a_model(inventory):
    assert Imatrix({EXPERTS: entry(1, 0, 2)}).matches(inventory) == ("blk.0.attn_q.weight", "token_embd.weight")
    whole = Imatrix({EXPERTS: entry(1, row=12), "blk.0.attn_q.weight": entry(1), "token_embd.weight": entry(1, row=7)})
    assert whole.matches(inventory) == ()


@pytest.mark.parametrize(
    ("name", "item", "message"),
    [
        ("blk.9.attn_q.weight", entry(1), "model.gguf has no tensor blk.9.attn_q.weight"),
        ("blk.0.attn_q.weight", entry(1, row=5), r"tensor blk.0.attn_q.weight: got 5 values, expected 4 \(4 x 1\)"),
        (EXPERTS, entry(1, 1), rf"tensor {EXPERTS}: got 8 values, expected 12 \(4 x 3\)"),
    ],
)
def test_of_another_model(inventory, name, item, message):
    with pytest.raises(InputError, match="imatrix is of another model: " + message):
        Imatrix({name: item}).matches(inventory)


def test_data_sets_are_never_empty_in_the_file(tmp_path):
    write_imatrix(Imatrix({EXPERTS: entry(1)}), tmp_path / "i.gguf")
    assert read_imatrix(tmp_path / "i.gguf") == Imatrix({EXPERTS: entry(1)}, (UNKNOWN_DATASET,), 0, 1)
    assert "general.architecture" not in GGUFReader(tmp_path / "i.gguf").fields


def test_a_real_imatrix(tmp_path):
    imatrix = read_imatrix(REAL)
    assert (len(imatrix.entries), imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size) == (30, ("t.txt",), 4, 128)
    experts = [item for name, item in imatrix.entries.items() if "_exps" in name]
    assert {item.sums.shape for item in experts} == {(16, 64), (16, 256)}
    assert all(int(item.counts.sum()) == 4 * 128 * 4 for item in experts)  # chunks, tokens in each, experts of each
    write_imatrix(imatrix, tmp_path / "again.gguf")
    assert read_imatrix(tmp_path / "again.gguf") == imatrix


def test_our_legacy_files_are_those_of_llama_imatrix(tmp_path):
    """Byte for byte, which also pins the order, the number of calls and the rounding."""
    write_legacy(read_imatrix(REAL), tmp_path / "i.dat")
    assert hashlib.sha256((tmp_path / "i.dat").read_bytes()).hexdigest() == REAL_LEGACY_SHA256


def test_llama_quantize_uses_what_we_write(llama_quantize, tmp_path):
    """The same weights in either format give the same file; other weights give another one."""
    inventory = read_inventory(small_model(tmp_path))
    random = np.random.default_rng(0)
    found = {
        name: ImatrixEntry(random.random(item.sums.shape, np.float32) + 0.01, np.full(item.counts.shape, 512))
        for name, item in imatrix_of(inventory).entries.items()
    }
    imatrix = Imatrix(found, ("text",), 1, 512)
    flipped = {name: ImatrixEntry(item.sums[:, ::-1].copy(), item.counts) for name, item in found.items()}
    outputs = []
    for write, content in [
        (write_imatrix, imatrix),
        (write_legacy, imatrix),
        (write_imatrix, Imatrix(flipped, ("text",), 1, 512)),
    ]:
        write(content, tmp_path / IMATRIX)
        assert run(tmp_path, {}, "--imatrix", IMATRIX, base="Q4_0").returncode == 0
        outputs.append((tmp_path / OUTPUT).read_bytes())
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


def test_a_legacy_entry_without_calls(llama_quantize, tmp_path):
    """Its values are the weights as they are, not nothing: the same file as from a GGUF that says so."""
    inventory = read_inventory(small_model(tmp_path))
    random = np.random.default_rng(0)
    found = {
        name: ImatrixEntry(random.random((1, item.sums.size), np.float32) + 0.01, np.array([1]))
        for name, item in imatrix_of(inventory).entries.items()
    }
    imatrix = Imatrix(found, ("text",), 1, 1)
    write_legacy(imatrix, tmp_path / IMATRIX)
    without = no_calls((tmp_path / IMATRIX).read_bytes())
    (tmp_path / IMATRIX).write_bytes(without)
    read = read_imatrix(tmp_path / IMATRIX)
    outputs = []
    for write in (lambda: None, lambda: write_imatrix(imatrix, tmp_path / IMATRIX)):
        write()
        assert run(tmp_path, {}, "--imatrix", IMATRIX, base="Q4_0").returncode == 0
        outputs.append((tmp_path / OUTPUT).read_bytes())
    assert outputs[0] == outputs[1]
    assert all(np.array_equal(read.entries[name].weights, item.weights) for name, item in found.items())


def no_calls(content):
    """A legacy file with the number of calls of every entry set to 0."""
    changed, position = bytearray(content), 4
    for _ in range(int.from_bytes(content[:4], "little")):
        position += 4 + int.from_bytes(content[position : position + 4], "little")
        changed[position : position + 4] = bytes(4)
        position += 8 + 4 * int.from_bytes(content[position + 4 : position + 8], "little")
    return bytes(changed)


def test_llama_quantize_stops_at_another_models_imatrix(llama_quantize, tmp_path):
    inventory = read_inventory(small_model(tmp_path))
    whole = imatrix_of(inventory)
    sliced = whole.slice_experts(lambda name: [0, 2] if "exps" in name else None, 3)
    write_imatrix(sliced, tmp_path / IMATRIX)
    with pytest.raises(InputError, match="ffn_down_exps.weight: got 1408 values, expected 2112"):
        sliced.matches(inventory)
    assert run(tmp_path, {}, "--imatrix", IMATRIX).returncode == 1
