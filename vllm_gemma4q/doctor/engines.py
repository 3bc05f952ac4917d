"""Engines whose verdict is asked for, and what sets them apart.

    vllm         vLLM 0.32 with this package's plugin
    vllm-stock   vLLM 0.32 without it
    llama.cpp    GGUF files
    exllamav3    EXL3 and unquantized checkpoints

What stock vLLM does silently is known for 0.32, so no other version is answered for.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from vllm_gemma4q.errors import InputError

VLLM, VLLM_STOCK, LLAMA_CPP, EXLLAMAV3 = "vllm", "vllm-stock", "llama.cpp", "exllamav3"
VLLM_VERSION = "0.32.0"
_NAMES = (VLLM, VLLM_STOCK, LLAMA_CPP, EXLLAMAV3)


class Device(StrEnum):
    """Where the engine runs: vLLM for CPUs lacks kernels that GPUs have."""

    GPU = "gpu"
    CPU = "cpu"


@dataclass(frozen=True)
class Engine:
    """One engine as it will be started.

    Attributes:
        version: None where verdicts do not depend on it.
        ranks: tensor parallelism.
        expert_parallel: experts are spread over ranks whole.
    """

    name: str
    version: str | None
    device: Device = Device.GPU
    ranks: int = 1
    expert_parallel: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}" if self.version else self.name

    @property
    def is_vllm(self) -> bool:
        return self.name in (VLLM, VLLM_STOCK)

    @property
    def has_plugin(self) -> bool:
        return self.name == VLLM


def parse_engine(text: str, device: Device = Device.GPU, ranks: int = 1, expert_parallel: bool = False) -> Engine:
    """`vllm`, `vllm==0.32.0`, `vllm-stock==0.32.0`, `llama.cpp` or `exllamav3`.

    Raises:
        InputError: another engine or version, or ranks for an engine other than vLLM.
    """
    name, given, version = text.partition("==")
    if name not in _NAMES:
        raise InputError(f"--engine {text}: got an unknown engine, expected one of {', '.join(_NAMES)}")
    is_vllm = name in (VLLM, VLLM_STOCK)
    if given and not (is_vllm and re.fullmatch(r"0\.32(?:\.\d+)?", version)):
        expected = f"{name}=={VLLM_VERSION}" if is_vllm else name
        raise InputError(f"--engine {text}: got version {version!r}, expected {expected}")
    if not is_vllm and (ranks > 1 or expert_parallel):
        raise InputError(f"--engine {text}: got -tp or -ep, expected neither: they are vLLM's")
    return Engine(name, (version or VLLM_VERSION) if is_vllm else None, device, ranks, expert_parallel)
