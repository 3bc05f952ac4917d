"""What a device can run, and why not where it cannot.

Every backend answers `can_implement` with a `Support`, so that a refusal always carries its reason. The probes here
import Triton or vLLM only when they are asked about them, and their answers are cached for the life of the process.
"""

import importlib.util
import os
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Support:
    """Whether something can run; `reason` names the value that refused, and is empty where `ok`."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


YES = Support(True)


def no(reason: str) -> Support:
    """A refusal with its reason."""
    return Support(False, reason)


def architecture(device: torch.device) -> str:
    """Exact architecture as Triton and the tile tables name it: `sm_90`, `gfx1100`, or the device type (`cpu`)."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def triton_interpreted() -> bool:
    """Whether Triton kernels that are imported from now on run in Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def triton_support(device: torch.device) -> Support:
    """Whether Triton kernels can be launched on `device`: a GPU, or the CPU under `TRITON_INTERPRET=1`."""
    if importlib.util.find_spec("triton") is None:
        return no("triton is not installed")
    if device.type == "cuda" or (device.type == "cpu" and triton_interpreted()):
        return YES
    return no(f"triton launches on GPUs (on a CPU only under TRITON_INTERPRET=1), got device {device}")


@cache
def int_mm_is_exact() -> Support:
    """Whether `torch._int_mm` is exact on this CPU.

    x86 without VNNI sums pairs of products in saturating 16-bit arithmetic and is silently wrong, so this multiplies
    the largest values once instead of trusting a list of processors.
    """
    x = torch.full((16, 64), 127, dtype=torch.int8)
    if bool((torch._int_mm(x, x.t()) == 64 * 127 * 127).all()):
        return YES
    return no("torch._int_mm saturates on this CPU (x86 without VNNI)")


@cache
def vllm_onednn() -> Support:
    """Whether vLLM's oneDNN INT8 operators are loaded, loading them where a CPU build of vLLM is installed."""
    if hasattr(torch.ops._C, "onednn_scaled_mm"):
        return int_mm_is_exact()
    if importlib.util.find_spec("vllm") is None:
        return no("vllm is not installed")
    try:
        from vllm.platforms import current_platform
    except (
        ImportError,
        OSError,
        RuntimeError,
        AttributeError,
    ) as error:  # a broken installation must not break the backends that do without it
        return no(f"vllm does not import: {error}")
    if not current_platform.is_cpu():
        return no(f"vllm is built for {current_platform.device_type}, not for the CPU")
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "onednn_scaled_mm"):
        return no("this build of vllm has no onednn_scaled_mm")
    return int_mm_is_exact()
