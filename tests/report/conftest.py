"""Checkpoints, made once, and a browser for the slow tests, unpacked into the cache where the machine has none."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from report.report_models import write_exl3, write_fp8, write_gguf, write_int8

SCRIPT = Path(__file__).resolve().parents[2] / "environment" / "browser.py"
GGUF_TYPES = {
    "q": GGMLQuantizationType.Q8_0, "k": GGMLQuantizationType.Q8_0, "v": GGMLQuantizationType.Q8_0,
    "o": GGMLQuantizationType.Q5_1, "gate": GGMLQuantizationType.Q4_0, "up": GGMLQuantizationType.Q4_0,
    "down": GGMLQuantizationType.Q4_1, "embedding": GGMLQuantizationType.Q8_0,
}  # fmt: skip


@pytest.fixture(scope="session")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_int8(tmp_path_factory.mktemp("report") / "int8")


@pytest.fixture(scope="session")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fp8(tmp_path_factory.mktemp("report") / "fp8")


@pytest.fixture(scope="session")
def exl3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_exl3(tmp_path_factory.mktemp("report") / "exl3")


@pytest.fixture(scope="session")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A mixed file and the F32 one."""
    folder = tmp_path_factory.mktemp("report")
    return write_gguf(folder / "mixed.gguf", GGUF_TYPES), write_gguf(folder / "f32.gguf", {})


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """A running Chromium."""
    from playwright.sync_api import sync_playwright

    spec = importlib.util.spec_from_file_location("gemma4q_browser", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.find_browser() is None:
        subprocess.run([sys.executable, SCRIPT], check=True)
    with sync_playwright() as playwright:
        # The sandbox needs privileges that containers lack; only pages made here are opened.
        yield playwright.chromium.launch(executable_path=str(module.find_browser()), args=["--no-sandbox"])
