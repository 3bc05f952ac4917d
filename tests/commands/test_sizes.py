"""Sizes as people type them, in both packages."""

import pytest

import gguf_mixed.errors
import vllm_gemma4q.errors
from gguf_mixed.commands.allocation_options import parse_bytes
from vllm_gemma4q.sizes import parse_size

ERRORS = {parse_bytes: gguf_mixed.errors.InputError, parse_size: vllm_gemma4q.errors.InputError}


@pytest.mark.parametrize("parse", ERRORS)
@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("5GB", 5 * 10**9), ("5GiB", 5 * 2**30), (" 500 mib ", 500 * 2**20), ("1.5k", 1500), ("60kB", 60_000), ("10", 10)],
)
def test_a_size(parse, text, n_bytes):
    assert parse(text) == n_bytes


@pytest.mark.parametrize("parse", ERRORS)
@pytest.mark.parametrize("text", ["", "0", "-5GB", "many", "5XB", "GB", "nan", "inf", "1e3"])
def test_no_size(parse, text):
    with pytest.raises(ERRORS[parse], match=f"size '{text}': expected a positive number with a unit, such as "):
        parse(text)
