"""Fixtures that need a real llama.cpp."""

import pytest

from gguf_mixed.errors import InputError
from gguf_mixed.llama_cpp import find_tool


@pytest.fixture
def llama_quantize():
    """Path of a llama-quantize; without one the test is skipped, and the recorded outcomes are all that is compared."""
    try:
        return find_tool("llama-quantize")
    except InputError as error:
        pytest.skip(f"{error}; environment/build_llama_cpp.py builds it")
