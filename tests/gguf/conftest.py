"""Fixtures that need a real llama.cpp: tests that ask for one are slow, and build it where it is missing."""

import subprocess
import sys
from pathlib import Path

import pytest

from gguf_mixed.errors import InputError
from gguf_mixed.llama_cpp import find_tool

BUILD = Path(__file__).resolve().parents[2] / "environment" / "build_llama_cpp.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "llama_quantize" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def llama_quantize() -> Path:
    """A llama-quantize: the machine's own, else one built into the cache (about six minutes on two cores)."""
    try:
        return find_tool("llama-quantize")
    except InputError:
        subprocess.run([sys.executable, BUILD], check=True)
        return find_tool("llama-quantize")
