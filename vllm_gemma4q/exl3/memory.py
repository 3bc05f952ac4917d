"""What quantizing a linear to EXL3 takes of a device's memory, and whether it is there: looked at before the first one,
since the output layer, the largest, comes last."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from gemma4q_kernels.exl3 import peak_bytes

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.exl3.facts import LM_HEAD
from vllm_gemma4q.linears import Linear

_MEMINFO = Path("/proc/meminfo")


def check_memory(linears: Iterable[Linear], bits: Mapping[str, int], has_hessian: bool, device: str) -> None:
    """Raises InputError: the linear that takes most does not fit in what is free, as far as the system says that."""
    peaks = ((peak_bytes(each.shape, bits[each.module], has_hessian, device), each.module) for each in linears)
    needed, largest = max(peaks)
    free = free_bytes(device)
    if free is None or needed <= free:
        return
    leave = "--head-bits 16, which leaves it as it is, or " if largest == LM_HEAD else ""
    raise InputError(
        f"{largest}: takes about {needed / 1e9:.1f} GB of memory to quantize, and device {device} has "
        f"{free / 1e9:.1f} free, expected {leave}a device with more"
    )


def free_bytes(device: str) -> int | None:
    """Memory that a device has left, swap included; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
        return sum(1024 * int(lines[key].split()[0]) for key in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        return None
