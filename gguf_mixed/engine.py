"""What writes the quantized file: the user's llama-quantize, or ggml's library when there is none."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gemma4q_kernels.ggml.quantize import WHEELS, Quantizers

from gguf_mixed.errors import InputError
from gguf_mixed.llama_cpp import find_tool
from gguf_mixed.measure import load_quantizers

_HOW = f"or install a wheel that ships ggml's library: pip install {WHEELS[0]}"


class Engine(StrEnum):
    """What the user asks for. An engine that is named is used or is an error; only AUTO looks further."""

    AUTO = "auto"
    LLAMA_QUANTIZE = "llama-quantize"
    GGML = "ggml"


@dataclass(frozen=True)
class Found:
    """The engine to use. `because` says why it is not the first choice, None where it is."""

    used: Path | Quantizers
    because: str | None = None


def find_engine(engine: Engine, folder: Path | None = None) -> Found:
    """Find the engine.

    Args:
        engine: AUTO takes llama-quantize when there is one, else the library.
        folder: a llama.cpp checkout, its build folder, or the folder of its programs: then nothing else is looked at.

    Raises:
        InputError: not found, or the library found cannot be loaded.
    """
    if engine is Engine.GGML:
        return Found(_library(folder))
    try:
        return Found(find_tool("llama-quantize", folder))
    except InputError as error:
        if engine is Engine.LLAMA_QUANTIZE:
            raise
        missing = str(error)
    try:
        return Found(load_quantizers(folder), missing)
    except InputError as error:
        raise InputError(f"{missing}, {_HOW} ({error})") from error


def _library(folder: Path | None) -> Quantizers:
    try:
        return load_quantizers(folder)
    except InputError as error:
        raise InputError(f"{error}; name a llama.cpp with --llama-cpp DIR, {_HOW}") from error
