"""Both quantizers as a user runs them, and what they leave behind."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file

GEMMA4Q = Path(sys.executable).with_name("gemma4q")
QUARK = Path(__file__).with_name("quark_int8.py")
BYSTANDER = "notes.txt"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Quantized:
    """An output folder."""

    folder: Path

    @cached_property
    def tensors(self) -> Tensors:
        tensors: Tensors = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            tensors |= load_file(path)
        return tensors

    @cached_property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def quantization(self) -> dict:
        return self.config["quantization_config"]

    @property
    def int8(self) -> set[str]:
        return {name for name, tensor in self.tensors.items() if tensor.dtype == torch.int8}


@dataclass(frozen=True)
class Pair:
    source: Quantized
    ours: Quantized
    quark: Quantized


def run_quark(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # One thread: on tensors this small, more only wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [python, QUARK, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=1200
    )


def run_ours(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [GEMMA4Q, "quantize", source, target, "--scheme", "quark-int8"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def occupied(folder: Path) -> Path:
    """An output folder in which somebody keeps a file."""
    folder.mkdir(parents=True)
    (folder / BYSTANDER).write_text("mine")
    return folder


def refused(result: subprocess.CompletedProcess[str], target: Path, *words: str) -> None:
    """One line that names what is wrong, exit code 2, nothing written."""
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert not target.exists()
