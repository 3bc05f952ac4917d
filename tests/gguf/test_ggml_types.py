"""ggml's sizes and llama-quantize's fallback rule."""

import ctypes
import subprocess
import sys

import pytest
from gemma4q_kernels.ggml import (
    QUANTIZABLE_TYPES,
    GGMLQuantizationType,
    NoFallbackError,
    bits_per_weight,
    block_size,
    fallback,
    is_legal,
    legal_types,
    parse_type,
    row_bytes,
    tensor_bytes,
    type_name,
)
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given
from hypothesis import strategies as st

T = GGMLQuantizationType


def test_sizes_are_those_of_the_real_library(llama_quantize):
    library = ctypes.CDLL(llama_quantize.resolve().parent / "libggml-base.so")
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_type_name.restype = ctypes.c_char_p
    for qtype in QUANTIZABLE_TYPES:
        assert library.ggml_blck_size(qtype.value) == block_size(qtype)
        assert library.ggml_row_size(qtype.value, 2816) == row_bytes(qtype, 2816)
        assert library.ggml_type_name(qtype.value).decode().lower() == type_name(qtype)


@pytest.mark.parametrize(
    ("name", "bpw"), [("IQ4_NL", 4.5), ("IQ3_S", 3.4375), ("Q5_K", 5.5), ("Q6_K", 6.5625), ("Q8_0", 8.5), ("BF16", 16)]
)
def test_bits_per_weight(name, bpw):
    assert bits_per_weight(T[name]) == bpw


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        *[(name, "IQ4_NL") for name in ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"]],
        *[(name, "Q4_0") for name in ["Q2_K", "Q3_K", "TQ1_0", "TQ2_0"]],
        ("Q4_K", "Q5_0"),
        ("Q5_K", "Q5_1"),
        ("Q6_K", "Q8_0"),
    ],
)
def test_rows_of_experts(asked, written):
    assert fallback(T[asked], 704) == fallback(T[asked], 2112) == T[written]
    assert fallback(T[asked], 2816) == T[asked]
    assert fallback(T[asked], 100) == T.F16


@pytest.mark.parametrize(("asked", "row"), [("Q1_0", 704), ("Q1_0", 100), ("NVFP4", 100)])
def test_types_without_a_substitute(asked, row):
    with pytest.raises(NoFallbackError, match=f"rows of {row} are not a multiple of"):
        fallback(T[asked], row)


@given(st.sampled_from(QUANTIZABLE_TYPES), st.integers(1, 10**6))
def test_what_is_written_is_always_legal(qtype, row):
    try:
        written = fallback(qtype, row)
    except NoFallbackError:
        assert qtype.name in {"Q1_0", "NVFP4"}
        return
    assert is_legal(written, row)
    assert (written == qtype) == is_legal(qtype, row)
    assert bits_per_weight(written) >= bits_per_weight(qtype)


@given(st.integers(1, 10**6))
def test_legal_types_fit_and_come_smallest_first(row):
    legal = legal_types(row)
    sizes = [row_bytes(qtype, row) for qtype in legal]
    assert sizes == sorted(sizes)
    for qtype in set(QUANTIZABLE_TYPES) - set(legal):
        with pytest.raises(ValueError, match="not a multiple"):
            row_bytes(qtype, row)


def test_tensor_bytes_counts_every_expert():
    assert tensor_bytes(T.Q8_0, (704, 2816, 128)) == 704 // 32 * 34 * 2816 * 128


def test_names_are_parsed_in_any_case():
    for qtype in QUANTIZABLE_TYPES:
        assert parse_type(type_name(qtype)) is parse_type(qtype.name) is qtype


@pytest.mark.parametrize("name", ["q9_k", "Q8_1", "I32", ""])
def test_names_that_are_no_target(name):
    with pytest.raises(ValueError, match="is not a type a model can be quantized to"):
        parse_type(name)


def test_every_type_of_the_package_is_a_target_or_known_not_to_be():
    never = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
    assert {qtype.name for qtype in GGML_QUANT_SIZES} == {qtype.name for qtype in QUANTIZABLE_TYPES} | never


def test_importing_needs_no_torch():
    code = "import sys, gemma4q_kernels.ggml; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
