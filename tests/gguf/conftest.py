"""Fixtures for real quantizers: those of a wheel, and of a real llama.cpp.

Tests that ask for llama.cpp are slow, and build it where it is missing.
"""

import subprocess
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path

import pytest
from gemma4q_kernels.ggml.quantize import Quantizers, find_library
from small_models import ROOT, checkpoint, convert, converter

from gguf_mixed.errors import InputError
from gguf_mixed.llama_cpp import find_tool

BUILD = ROOT / "environment" / "build_llama_cpp.py"


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


@pytest.fixture(scope="session", params=["wheel", pytest.param("llama.cpp", marks=pytest.mark.slow)])
def quantizers(request: pytest.FixtureRequest) -> Quantizers:
    """ggml's quantizers: of the wheel that development has, and of a llama.cpp."""
    if request.param == "wheel":
        return Quantizers(find_library([]))
    return Quantizers(find_library([request.getfixturevalue("llama_quantize").parent], wheels=False))


@pytest.fixture(scope="session")
def small_gguf(llama_quantize: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`small_gguf("dense" or "moe", dtype="f32")`: a small trained model, converted once. Not to be changed."""
    folder = tmp_path_factory.mktemp("small_models")
    if not converter().exists():
        subprocess.run([sys.executable, BUILD], check=True)

    def convert_once(kind: str, dtype: str = "f32") -> Path:
        path = folder / f"{kind}-{dtype}.gguf"
        return path if path.exists() else convert(checkpoint(kind), path, dtype)

    return convert_once


@pytest.fixture(scope="session")
def held_out_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sections of the Python reference that the small models were not trained on, 39,000 characters."""
    spec = util.spec_from_file_location("held_out", ROOT / "examples" / "small_gemma4" / "held_out.py")
    assert spec is not None and spec.loader is not None
    held_out = util.module_from_spec(spec)
    spec.loader.exec_module(held_out)
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text("\n\n".join(held_out.natural_text()), encoding="utf-8")
    return path
