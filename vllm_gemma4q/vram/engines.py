"""Engines and what each needs: weights of one rank, KV cache, and the rest as far as anyone says.

    vLLM         >= 0.21 caps sliding layers at their window and the tokens in flight, at startup and when it admits a
                 request (vllm pull request 40946); before, a request was admitted only once the blocks of all its
                 tokens were free in every layer. From 0.26 on, tokens in flight are those of all concurrent batches
                 (47728), which is two with asynchronous scheduling, the default.
    exllamav3    the allocator of the published EXL3 table: every layer keeps the full context, FP16.
    llama.cpp    b11434: sliding layers keep their window and a micro-batch; `--swa-full` keeps all.

Tokens in flight: what vLLM schedules at once by default depends on the GPU's memory (vLLM 0.32
`engine/arg_utils.py`), with 2496 at least where the model sees videos (32 frames of 78 tokens, `gemma4_mm.py`).
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.vram.kv_cache import VllmPool, full_context_bytes, llama_cpp_bytes
from vllm_gemma4q.vram.source import Source
from vllm_gemma4q.vram.weights import Part, stored_bytes, vllm_bytes

GIB = 2**30
VLLM, EXLLAMAV3, LLAMA_CPP = "vllm", "exllamav3", "llama.cpp"
DEFAULT_VLLM_VERSION = "0.32.0"
_FIRST_GEMMA4, _FIRST_CAPPED, _FIRST_CONCURRENT = (0, 19), (0, 21), (0, 26)
_BATCHED_TOKENS = ((160 * GIB, 16384), (70 * GIB, 8192), (0, 2048))  # of `vllm serve`, by the GPU's memory at least
_VIDEO_TOKENS = 32 * (70 + 2 + 6)
_UBATCH = 512
EXLLAMAV3_CONTEXT_BYTES = round(0.8 * GIB)
NOT_MEASURED = "not measured"


class KvDtype(StrEnum):
    """Element type of the KV cache. `auto`: FP8 where the checkpoint asks vLLM for it, two bytes otherwise."""

    AUTO = "auto"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"


@dataclass(frozen=True)
class Request:
    """How a model is to be served.

    Attributes:
        gpu_bytes: memory of one GPU; None where it was not told.
        in_flight: vLLM's tokens in flight, llama.cpp's micro-batch; None: the engine's default.
        overhead: bytes beside weights and cache, as measured by the user; None where they were not.
    """

    kv_dtype: KvDtype = KvDtype.AUTO
    ranks: int = 1
    in_flight: int | None = None
    gpu_bytes: int | None = None
    overhead: int | None = None
    swa_full: bool = False


class Engine(ABC):
    """One engine at one version."""

    name: str
    version: str | None = None

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}" if self.version else self.name

    @abstractmethod
    def weights(self, source: Source, request: Request) -> Mapping[Part, int]:
        """Bytes of weights on one rank. Raises InputError for what the engine cannot load or split."""

    @abstractmethod
    def cache_bytes(self, source: Source, request: Request, tokens: int) -> int:
        """Bytes of the KV cache on one rank for one request. Raises InputError for a type it does not have."""

    def in_flight(self, source: Source, request: Request) -> int | None:
        """Tokens in flight that the cache depends on; None where it does not."""
        return None

    def element_bytes(self, source: Source, request: Request) -> int:
        """Bytes of one element of the KV cache."""
        return 1 if request.kv_dtype is KvDtype.FP8 else 2

    def other(self, request: Request) -> tuple[int | None, str]:
        """Bytes beside weights and cache, and who says so; None where nobody does."""
        return (None, NOT_MEASURED) if request.overhead is None else (request.overhead, "--overhead")


class Vllm(Engine):
    """vLLM with its hybrid KV cache, on GPUs."""

    name = VLLM

    def __init__(self, version: str) -> None:
        match = re.fullmatch(r"(\d+)\.(\d+)(?:\.\d+)?(?:[a-z+.-].*)?", version)
        if match is None:
            raise InputError(f"--engine vllm=={version}: got no version, expected one such as {DEFAULT_VLLM_VERSION}")
        self.version = version
        self._release = (int(match[1]), int(match[2]))
        if self._release < _FIRST_GEMMA4:
            raise InputError(f"--engine vllm=={version}: expected 0.19 or later, which know Gemma 4")

    def weights(self, source: Source, request: Request) -> Mapping[Part, int]:
        if source.architecture is None:
            raise InputError(f"{source.name}: got a GGUF file, which vLLM does not load for Gemma 4")
        return vllm_bytes(source.architecture, source.tensors, request.ranks)

    def cache_bytes(self, source: Source, request: Request, tokens: int) -> int:
        return self.pool(source, request).pool_bytes(tokens)

    def pool(self, source: Source, request: Request) -> VllmPool:
        """vLLM's pool of blocks for this model."""
        in_flight = self.in_flight(source, request)
        return VllmPool(source.cache, self.element_bytes(source, request), in_flight, request.ranks)

    def in_flight(self, source: Source, request: Request) -> int | None:
        if self._release < _FIRST_CAPPED:
            return None
        if request.in_flight is not None:
            return request.in_flight
        batch = next(tokens for least, tokens in _BATCHED_TOKENS if (request.gpu_bytes or 0) >= least)
        batch = max(batch, _VIDEO_TOKENS if source.has_vision else 0)
        return batch * (2 if self._release >= _FIRST_CONCURRENT else 1)

    def element_bytes(self, source: Source, request: Request) -> int:
        if request.kv_dtype is KvDtype.AUTO:
            return 1 if source.fp8_cache else 2
        return super().element_bytes(source, request)


class ExLlamaV3(Engine):
    """The allocator of the published EXL3 table."""

    name = EXLLAMAV3

    def weights(self, source: Source, request: Request) -> Mapping[Part, int]:
        _refuse_ranks(self, request)
        if source.architecture is None:
            raise InputError(f"{source.name}: got a GGUF file, expected a checkpoint folder for {self.name}")
        return stored_bytes(source.tensors)

    def cache_bytes(self, source: Source, request: Request, tokens: int) -> int:
        if request.kv_dtype in (KvDtype.FP8, KvDtype.BF16):
            raise InputError(f"--kv-dtype {request.kv_dtype}: expected auto or fp16 for {self.name}")
        return full_context_bytes(source.cache, tokens, self.element_bytes(source, request))

    def other(self, request: Request) -> tuple[int | None, str]:
        if request.overhead is not None:
            return super().other(request)
        return EXLLAMAV3_CONTEXT_BYTES, "published EXL3 table"


class LlamaCpp(Engine):
    """llama.cpp with every layer on the GPU and one sequence."""

    name = LLAMA_CPP
    version = "b11434"

    def weights(self, source: Source, request: Request) -> Mapping[Part, int]:
        _refuse_ranks(self, request)
        if source.gguf_parts is None:
            raise InputError(f"{source.name}: got safetensors, expected a .gguf file for {self.name}")
        return source.gguf_parts

    def cache_bytes(self, source: Source, request: Request, tokens: int) -> int:
        if request.kv_dtype is KvDtype.FP8:
            raise InputError(f"--kv-dtype fp8: expected auto, fp16 or bf16 for {self.name}, which has no FP8 cache")
        size = self.element_bytes(source, request)
        return llama_cpp_bytes(source.cache, tokens, size, self.in_flight(source, request), request.swa_full)

    def in_flight(self, source: Source, request: Request) -> int:
        return _UBATCH if request.in_flight is None else request.in_flight


def parse_engine(text: str) -> Engine:
    """An engine from `vllm`, `vllm==0.20.1`, `exllamav3` or `llama.cpp`.

    Raises:
        InputError: no such engine, a version that is none, or that does not know Gemma 4.
    """
    name, separator, version = text.partition("==")
    if name == VLLM:
        return Vllm(version if separator else DEFAULT_VLLM_VERSION)
    others: dict[str, type[Engine]] = {EXLLAMAV3: ExLlamaV3, LLAMA_CPP: LlamaCpp}
    if name in others and not separator:
        return others[name]()
    raise InputError(f"--engine {text}: expected vllm, vllm==VERSION, {EXLLAMAV3} or {LLAMA_CPP}")


def default_engines(source: Source, kv_dtype: KvDtype) -> list[Engine]:
    """The engines that load this format: vLLM, and the format's own."""
    if source.gguf_parts is not None:
        return [LlamaCpp()]
    vllm = parse_engine(VLLM)
    return [vllm, ExLlamaV3()] if source.is_exl3 and kv_dtype in (KvDtype.AUTO, KvDtype.FP16) else [vllm]


def _refuse_ranks(engine: Engine, request: Request) -> None:
    if request.ranks != 1:
        raise InputError(f"-tp {request.ranks}: expected 1 for {engine.name}: only vLLM's split is known")
