"""ggml's quantizers through ctypes: the bits, the effect of weights, and everything that would end the process."""

import ctypes.util
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from gemma4q_kernels.ggml import QUANTIZABLE_TYPES, GGMLQuantizationType, bits_per_weight, row_bytes
from gemma4q_kernels.ggml.quantize import NEEDS_WEIGHTS, Quantizers, find_library
from gguf import quants

T = GGMLQuantizationType
LENGTH = 512
# What the gguf package can decode; its encoder agrees bit for bit for these.
SAME_BITS = (T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1)
DECODED = tuple(qtype for qtype in QUANTIZABLE_TYPES if qtype.name != "Q1_0")  # which its version 0.19 cannot read


def rows(n=16, length=LENGTH, seed=0):
    return np.random.default_rng(seed).standard_normal((n, length), dtype=np.float32)


def uneven_weights(seed=1):
    return np.exp(2 * np.random.default_rng(seed).standard_normal(LENGTH)).astype(np.float32)


def weighted_error(found, expected, weights):
    return float((weights * (found - expected).astype(np.float64) ** 2).sum())


def test_knows_every_type_of_the_package(quantizers):
    assert set(quantizers.types) == set(QUANTIZABLE_TYPES)


@pytest.mark.parametrize("qtype", SAME_BITS, ids=lambda qtype: qtype.name)
def test_bits_are_those_of_the_gguf_package(quantizers, qtype):
    values = rows()
    packed = quantizers.quantize(values, qtype)
    expected = quants.quantize(values, qtype)
    assert packed.tobytes() == expected.tobytes()
    assert np.array_equal(quantizers.dequantize(packed, qtype), quants.dequantize(expected, qtype))


@pytest.mark.parametrize("qtype", DECODED, ids=lambda qtype: qtype.name)
def test_dequantizes_like_the_gguf_package(quantizers, qtype):
    packed = quantizers.quantize(rows(), qtype, np.ones(LENGTH, np.float32))
    assert packed.shape == (16, row_bytes(qtype, LENGTH))
    found = quantizers.dequantize(packed, qtype)
    assert np.array_equal(found, quants.dequantize(packed, qtype))


def test_error_falls_with_bits(quantizers):
    values = rows()
    families = [
        (T.IQ1_S, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_XS),
        (T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K),
        (T.Q4_0, T.Q5_0, T.Q8_0, T.F16, T.F32),
        (T.Q4_1, T.Q5_1, T.Q8_0),
    ]
    ones = np.ones(LENGTH, np.float32)
    for family in families:
        assert [bits_per_weight(q) for q in family] == sorted(bits_per_weight(q) for q in family)
        errors = [weighted_error(quantizers.round_trip(values, qtype, ones), values, ones) for qtype in family]
        assert all(worse > better for worse, better in pairwise(errors)), family


@pytest.mark.parametrize("qtype", [T.IQ4_NL, T.Q4_K, T.Q3_K, T.IQ3_S], ids=lambda qtype: qtype.name)
def test_weights_lower_the_weighted_error(quantizers, qtype):
    values, weights = rows(), uneven_weights()
    with_weights = weighted_error(quantizers.round_trip(values, qtype, weights), values, weights)
    without = weighted_error(quantizers.round_trip(values, qtype), values, weights)
    assert with_weights < 0.9 * without


def test_weights_of_zero_are_survived(quantizers):
    for qtype in quantizers.types:
        assert np.isfinite(quantizers.round_trip(rows(2), qtype, np.zeros(LENGTH, np.float32))).all(), qtype.name


def spoilt(value):
    values = rows(2)
    values[1, 7] = value
    return values


REFUSED = {
    "not a number": (lambda: spoilt(np.nan), T.Q4_K, None, "not finite"),
    "infinite": (lambda: spoilt(np.inf), T.IQ3_S, None, "not finite"),
    "beyond F16": (lambda: spoilt(1e9), T.IQ2_S, None, r"up to 1e\+09, IQ2_S ends at 65504"),
    "partial block": (lambda: rows(2, 704), T.Q4_K, None, "rows of 704 are not a multiple of Q4_K's block of 256"),
    "every second column": (lambda: rows()[:, ::2], T.Q8_0, None, "non-contiguous"),
    "float64": (lambda: rows().astype(np.float64), T.Q8_0, None, r"float64 \[16, 512\]"),
    "one dimension": (lambda: rows()[0], T.Q8_0, None, r"float32 \[512\]"),
    "no rows": (lambda: rows(0), T.Q8_0, None, r"\[0, 512\]"),
    "never written": (rows, T.Q8_K, None, "Q8_K"),
    "weights of another length": (rows, T.Q4_K, np.ones(256, np.float32), r"expected contiguous float32 \[512\]"),
    "negative weights": (rows, T.Q4_K, -np.ones(LENGTH, np.float32), "negative"),
    "weights that overflow": (rows, T.Q4_K, np.full(LENGTH, 1e38, np.float32), "overflow float32"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_would_end_the_process_is_refused(quantizers, case):
    values, qtype, weights, message = case
    with pytest.raises(ValueError, match=message):
        quantizers.round_trip(values(), qtype, weights)


@pytest.mark.parametrize("name", sorted(NEEDS_WEIGHTS))
def test_types_that_need_weights_are_refused_without(quantizers, name):
    with pytest.raises(ValueError, match=f"{name} needs"):
        quantizers.quantize(rows(), T[name])


def test_the_list_of_those_types_is_ggmls(quantizers):
    requires = ctypes.CDLL(str(quantizers.library)).ggml_quantize_requires_imatrix
    requires.argtypes, requires.restype = [ctypes.c_int], ctypes.c_bool
    assert {qtype.name for qtype in quantizers.types if requires(qtype.value)} == NEEDS_WEIGHTS


def test_packed_rows_that_do_not_fit_are_refused(quantizers):
    with pytest.raises(ValueError, match="rows of 33 bytes"):
        quantizers.dequantize(np.zeros((1, 33), np.uint8), T.Q8_0)
    with pytest.raises(ValueError, match="contiguous uint8"):
        quantizers.dequantize(np.zeros((1, 34), np.int8), T.Q8_0)


def test_a_library_of_another_kind_is_refused():
    other = ctypes.util.find_library("c")
    with pytest.raises(OSError, match="not libggml-base"):
        Quantizers(Path(other or sys.executable))


def test_a_missing_library_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # where installed wheels are found
    with pytest.raises(FileNotFoundError, match="not in .*none$"):
        find_library([tmp_path / "none"], wheels=False)
    with pytest.raises(FileNotFoundError, match="the wheel libggml-python"):
        find_library([tmp_path / "none"])


def test_what_cannot_be_loaded_is_named(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "libggml-base.so").touch()
    with pytest.raises(OSError, match="one/bin/libggml-base.so: cannot be loaded: .*; .*two/bin/libggml-base.so: can"):
        find_library([tmp_path / "one", tmp_path / "two"], wheels=False)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc's symbol versions")
def test_a_library_for_a_newer_system_is_passed_over(quantizers, tmp_path):
    """As with the newest llama-cpp-py-sync on Debian 12."""
    newer, usable = tmp_path / "newer" / "libggml-base.so", tmp_path / "usable" / "libggml-base.so"
    for path in (newer, usable):
        path.parent.mkdir()
    needed = re.search(rb"\0GLIBC_2(\.\d+)\0", quantizers.library.read_bytes())
    newer.write_bytes(quantizers.library.read_bytes().replace(needed[0], b"\0GLIBC_9" + needed[1] + b"\0"))
    usable.symlink_to(quantizers.library.resolve())
    message = rf"{newer}: is built for a newer system: needs GLIBC_9\.\d+, here is glibc \d"
    with pytest.raises(OSError, match=message):
        find_library([newer.parent], wheels=False)
    assert find_library([newer.parent, usable.parent], wheels=False) == usable


@pytest.mark.parametrize(
    "layout", ["libggml/lib64/libggml-base.so", "pywhispercpp.libs/libggml-base-319ad4fb.so.0.13.1"]
)
def test_found_in_a_wheel(quantizers, tmp_path, monkeypatch, layout):
    """A wheel as pip unpacks it; one that is listed before it ships no library that can be loaded."""
    write_wheel(tmp_path, "libggml-python", "libggml/bin/libggml-base.so", b"")
    write_wheel(tmp_path, "pywhispercpp", layout, quantizers.library.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    assert find_library([]) == tmp_path / layout
    with pytest.raises(FileNotFoundError):
        find_library([], wheels=False)


def write_wheel(folder, name, library, content):
    (folder / library).parent.mkdir(parents=True)
    (folder / library).write_bytes(content)
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{library},,\n{info.name}/METADATA,,\n")
