"""What several benchmarks write alike: where and with what a result was measured, and the file itself."""

import dataclasses
import datetime
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from h200_goals import Figure

from vllm_gemma4q.benchmark.machine import device_facts, versions


def on_this_cpu(loaded: bool, *packages: str) -> dict[str, Any]:
    """Head of a result that a CPU gave.

    Args:
        loaded: other work ran on the machine.
        packages: whose versions matter beside those that always do.
    """
    return {
        "date": datetime.date.today().isoformat(),
        "loaded": loaded,
        "machine": {**device_facts(torch.device("cpu")), "system": platform.system()},
        "versions": {**versions(), **{name: metadata.version(name) for name in packages}},
    }


def require_nvidia(benchmark: str) -> None:
    """End the program where torch sees no NVIDIA GPU."""
    if not torch.cuda.is_available() or torch.version.hip:
        print(f"error: {benchmark}: needs an NVIDIA GPU, torch sees none", file=sys.stderr)
        sys.exit(2)


def write_goals(output: Path, device: torch.device, figures: Sequence[Figure], raw: Mapping[str, Any]) -> None:
    """Write what a GPU gave, and say how many goals it met."""
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": device_facts(device),
        "versions": versions(),
        "goals": [dataclasses.asdict(figure) for figure in figures],
        **raw,
    }
    write(output, result)
    judged = [figure.met for figure in figures if figure.met is not None]
    print(f"{sum(judged)} of {len(judged)} goals met; {output}")


def write(output: Path, result: Mapping[str, Any]) -> None:
    """As JSON; the folder is made where it is missing."""
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
