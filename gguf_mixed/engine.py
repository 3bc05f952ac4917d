"""What writes the quantized file: the user's llama-quantize, or ggml's library when there is none."""

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gemma4q_kernels.ggml.quantize import WHEELS, Quantizers

from gguf_mixed.errors import InputError
from gguf_mixed.ggml_writer import check_writable, write_model
from gguf_mixed.llama_cpp import Log, find_tool
from gguf_mixed.measure import load_quantizers
from gguf_mixed.quantize import (
    Job,
    build_command,
    check_output,
    check_source,
    partial_path,
    run_and_verify,
    write_and_verify,
)

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


@dataclass(frozen=True)
class Writing:
    """A file that is about to be written, everything checked that can be without its folder.

    Attributes:
        description: the command line, or what the library will do.
        write: writes and verifies the file, and returns the differences from the plan. It gets what takes each line
            that the command prints, and whether to show a bar, which the library has.
    """

    job: Job
    output: Path
    description: str
    write: Callable[[Log, bool], list[str]]

    def run(self, log: Log, *, overwrite: bool = False, progress: bool = False) -> list[str]:
        """Write the file, and return the differences from the plan.

        Raises:
            InputError: see `check_output` and `write_and_verify`.
        """
        check_output(self.job, self.output, overwrite)
        return self.write(log, progress)


def prepare(
    found: Found, job: Job, table: Path, output: Path, *, threads: int | None = None, allow_requantize: bool = False
) -> Writing:
    """Prepare to write a job's output with an engine.

    Args:
        table: the file of the job's table, which llama-quantize reads.
        threads: None: llama-quantize's own choice, or all processors.

    Raises:
        InputError: see `check_source`, `build_command` and `check_writable`.
    """
    if isinstance(found.used, Quantizers):
        check_source(job, allow_requantize)
        return _with_library(found.used, job, output, threads or os.cpu_count() or 1)
    command = build_command(
        found.used, job, table, partial_path(output), threads=threads, allow_requantize=allow_requantize
    )

    def write(log: Log, progress: bool) -> list[str]:
        log(shlex.join(command))
        return run_and_verify(job, command, output, log)

    return Writing(job, output, shlex.join(command), write)


def _with_library(quantizers: Quantizers, job: Job, output: Path, threads: int) -> Writing:
    check_writable(job, quantizers)
    copied = sum(job.written[name] is tensor.qtype for name, tensor in job.inventory.tensors.items())
    description = (
        f"{output}: {job.file_bytes:,} bytes, {job.bpw:.3f} bpw\n"
        f"{len(job.written) - copied} tensors quantized and {copied} copied by {threads} threads\n"
        f"with {quantizers.library}"
    )

    def write(log: Log, progress: bool) -> list[str]:
        return write_and_verify(job, output, lambda path: write_model(job, quantizers, path, threads, progress))

    return Writing(job, output, description, write)


def _library(folder: Path | None) -> Quantizers:
    try:
        return load_quantizers(folder)
    except InputError as error:
        raise InputError(f"{error}; name a llama.cpp with --llama-cpp DIR, {_HOW}") from error
