"""Which engine runs which model. Engines are imported when they are asked for: each takes seconds."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_gemma4q.evaluation.engines.interface import Engine
    from vllm_gemma4q.evaluation.engines.llama_cpp import LlamaCpp

_GGUF = ".gguf"


class EngineName(StrEnum):
    """For checkpoint folders. GGUF files have one engine, llama.cpp."""

    VLLM = "vllm"
    TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Settings:
    """How models are run.

    Attributes:
        engine: for checkpoint folders.
        dtype: of that engine, "auto" for the checkpoint's own.
        tensor_parallel_size: ranks, of vLLM.
        device: of transformers, "cpu" or "cuda".
        llama_cpp: folder of the programs that run GGUF files; None: where they usually are.
    """

    engine: EngineName = EngineName.VLLM
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    device: str = "cpu"
    llama_cpp: Path | None = None

    def for_gguf(self, text: str) -> "LlamaCpp":
        """What runs GGUF files, on one text."""
        from vllm_gemma4q.evaluation.engines.llama_cpp import LlamaCpp

        return LlamaCpp(text, self.llama_cpp)

    def for_folders(self) -> "Engine":
        """What runs checkpoint folders. Raises InputError: it does not know the dtype or the device."""
        if self.engine is EngineName.VLLM:
            from vllm_gemma4q.evaluation.engines.vllm import VLLM

            return VLLM(self.dtype, self.tensor_parallel_size)
        from vllm_gemma4q.evaluation.engines.transformers import Transformers

        return Transformers(self.dtype, self.device)


def is_gguf(model: Path) -> bool:
    """A GGUF file, which llama.cpp runs; anything else is taken for a checkpoint folder."""
    return model.suffix == _GGUF
