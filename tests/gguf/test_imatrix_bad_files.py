"""Imatrix files that are not what they should be, in both formats."""

import struct

import numpy as np
import pytest
from gguf import GGUFWriter

from gguf_mixed.errors import InputError
from gguf_mixed.imatrix import Imatrix, ImatrixEntry
from gguf_mixed.imatrix_gguf import read_imatrix, write_imatrix
from gguf_mixed.imatrix_legacy import write_legacy


def entry(*counts, row=4):
    return ImatrixEntry(np.ones((len(counts), row), np.float32), np.array(counts))


@pytest.mark.parametrize(
    ("imatrix", "message"),
    [(Imatrix({}), "an imatrix without entries"), (Imatrix({"a" * 56: entry(1)}), "too long a name")],
)
def test_what_cannot_be_written(tmp_path, imatrix, message):
    with pytest.raises(InputError, match=message):
        write_imatrix(imatrix, tmp_path / "i.gguf")
    assert not (tmp_path / "i.gguf").exists()


def write_raw(path, tensors, kind="imatrix"):
    writer = GGUFWriter(path, arch="x")
    writer.add_type(kind)
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ONE, TWO = np.ones((1, 1), np.float32), np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        ({"a.in_sum2": TWO}, "model", "not an imatrix: general.type is 'model'"),
        ({"a.in_sum2": TWO}, "imatrix", "tensor a has .in_sum2 but no .counts"),
        ({"a.counts": ONE}, "imatrix", "tensor a.counts has no .in_sum2 beside it"),
        ({"a.in_sum2": TWO, "a.counts": ONE, "b.in_sum": ONE}, "imatrix", "tensor b.in_sum has no .in_sum2 beside it"),
        ({"x": ONE}, "imatrix", "an imatrix without entries"),
        ({"a.in_sum2": TWO, "a.counts": np.ones((4, 1), np.float32)}, "imatrix", "6 sums and 4 counts do not fit"),
        ({"a.in_sum2": TWO, "a.counts": ONE, "a.in_sum": ONE}, "imatrix", "tensor a: 6 sums and 1 counts do not fit"),
        ({"a.in_sum2": TWO.astype(np.float16), "a.counts": ONE}, "imatrix", "a.in_sum2 is F16, expected F32"),
        ({"a.in_sum2": TWO * np.nan, "a.counts": ONE}, "imatrix", "a.in_sum2 holds values that are not finite"),
        ({"a.in_sum2": -TWO, "a.counts": ONE}, "imatrix", "tensor a: a sum of squares is negative"),
        ({"a.in_sum2": TWO, "a.counts": -ONE}, "imatrix", "tensor a: a count is negative"),
    ],
)
def test_broken_gguf_files(tmp_path, tensors, kind, message):
    with pytest.raises(InputError, match=f"i.gguf: .*{message}"):
        read_imatrix(write_raw(tmp_path / "i.gguf", tensors, kind))


def legacy(name=b"a", calls=1, values=(1.0, 2.0), n_entries=1, tail=b"", n_values=None):
    count = len(values) if n_values is None else n_values
    body = struct.pack("<i", len(name)) + name + struct.pack(f"<ii{len(values)}f", calls, count, *values)
    return struct.pack("<i", n_entries) + body + tail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not an imatrix: the number of entries"),
        (b"hello, this is no imatrix at all", "not an imatrix: it starts with 1819043176 entries"),
        (legacy(n_entries=0), "it starts with 0 entries"),
        (legacy(n_entries=-1), "it starts with -1 entries"),
        (legacy(n_entries=2), "not an imatrix: it starts with 2 entries"),
        (legacy(n_entries=2, tail=bytes(20)), "a tensor name is empty"),
        (legacy(n_entries=2, tail=legacy()[4:]), "tensor a appears twice"),
        (legacy(name=b"\xff"), "a tensor name is not UTF-8"),
        (legacy(n_values=0), "tensor a: 0 values, expected at least 1"),
        (legacy(n_values=-5), "tensor a: -5 values, expected at least 1"),
        (legacy(n_values=2**31 - 1), "truncated or not an imatrix: tensor a: 8589934588 bytes of 8 left"),
        (legacy(calls=-1), "tensor a: a count is negative"),
        (legacy(values=(1.0, float("nan"))), "tensor a: a sum of squares is negative or not finite"),
        (legacy(tail=struct.pack("<ii", 1, 99)), "the data set: 99 bytes of 0 left"),
    ],
)
def test_broken_legacy_files(tmp_path, content, message):
    path = tmp_path / "i.dat"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"i.dat: .*{message}"):
        read_imatrix(path)


def test_legacy_files_may_end_after_their_entries(tmp_path):
    path = tmp_path / "i.dat"
    path.write_bytes(legacy())
    assert read_imatrix(path) == Imatrix({"a": ImatrixEntry(np.array([[1, 2]], np.float32), np.array([1]))})


def test_values_without_calls_are_the_weights(tmp_path):
    path = tmp_path / "i.dat"
    path.write_bytes(legacy(calls=0))
    assert read_imatrix(path).entries["a"].weights.tolist() == [[1, 2]]


@pytest.mark.parametrize("write", [write_imatrix, write_legacy], ids=["gguf", "legacy"])
def test_cut_files_are_refused(tmp_path, write):
    path = tmp_path / "i.gguf"
    write(Imatrix({"a.weight": entry(1, 2), "b.weight": entry(3)}, ("text",), 1, 1), path)
    content = path.read_bytes()
    optional = 8 + len("text") if write is write_legacy else 32  # data set and chunks; padding after the last tensor
    for length in range(len(content) - optional):
        path.write_bytes(content[:length])
        with pytest.raises(InputError):
            read_imatrix(path)
