"""BF16 Gemma 4 checkpoint in, EXL3 checkpoint out: file to file, one linear in memory at a time with its Hessian.

Attention, dense MLP and experts of every layer are quantized, experts one by one, and the output layer, from the
embedding where it is tied: then the file holds both, the embedding as it was. Everything else is copied bit for bit.

Every layer is a shard of its own, or several, so that a killed run loses at most one layer's work; a smaller
`max_shard_bytes` loses less. Sizes are known before anything is computed. Every linear has a seed of its own, from its
name: the same command writes the same bytes on the same machine, in one run or in many.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gemma4q_kernels.exl3 import CODEBOOKS, choose_encoder

from vllm_gemma4q.architecture import Role, TextArchitecture, parse_text_architecture
from vllm_gemma4q.calibration.identity import check_same_model
from vllm_gemma4q.checkpoint import Checkpoint
from vllm_gemma4q.checkpoint.convert import Conversion
from vllm_gemma4q.checkpoint.steps import MAX_SHARD_BYTES
from vllm_gemma4q.conformance import FLOAT_DTYPES, check_unquantized
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.exl3 import output, storage
from vllm_gemma4q.exl3.allocation import MAX_BITS, MIN_BITS, allocate, mean_bits
from vllm_gemma4q.exl3.facts import LM_HEAD
from vllm_gemma4q.exl3.hessians import Hessians
from vllm_gemma4q.exl3.memory import check_memory
from vllm_gemma4q.exl3.report import by_role, with_errors
from vllm_gemma4q.exl3.steps import Writing, kept, seed_of
from vllm_gemma4q.linears import Linear, linears_of_model
from vllm_gemma4q.summary import summarize

SCHEME = "exl3"
QUANTIZED_ROLES = frozenset({Role.ATTENTION, Role.MLP, Role.EXPERTS})
UNQUANTIZED_HEAD = 16


@dataclass(frozen=True)
class Options:
    """What to write.

    Attributes:
        bits: of the layers' linears on average, 1 to 8; see `allocation.py`.
        head_bits: of the output layer, 1 to 8, or 16 to leave it as it is.
        codebook: "3inst", "mcg" or "mul1".
        device: where to compute, as torch names it.

    Raises:
        InputError: out of range.
    """

    bits: float
    head_bits: int = 6
    codebook: str = "mcg"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise InputError(f"bits: got {self.bits:g}, expected {MIN_BITS} to {MAX_BITS}")
        if not MIN_BITS <= self.head_bits <= MAX_BITS and self.head_bits != UNQUANTIZED_HEAD:
            expected = f"{MIN_BITS} to {MAX_BITS}, or {UNQUANTIZED_HEAD} to leave it unquantized"
            raise InputError(f"head bits: got {self.head_bits}, expected {expected}")
        if self.codebook not in CODEBOOKS:
            raise InputError(f"codebook: got {self.codebook!r}, expected one of {', '.join(CODEBOOKS)}")


def plan(
    source: Checkpoint, options: Options, statistics: Path | None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Conversion:
    """What quantizing a checkpoint will read, compute and write; only headers are read yet.

    Args:
        statistics: what `gemma4q calibrate --hessians` wrote for this model; None rounds every weight for itself.

    Raises:
        InputError: not a Gemma 4, already quantized, tensors are missing or have the wrong shape or dtype; see
            `Hessians` and `check_same_model`; nothing on this machine encodes fast enough to wait for.
    """
    architecture = parse_text_architecture(source.config)
    if "quantization_config" in source.config:
        method = source.config["quantization_config"]
        raise InputError(f"config.json: already quantized ({method}), expected a BF16 checkpoint")
    check_unquantized(architecture, source.tensors)
    found = linears_of_model(source.tensors, architecture, QUANTIZED_ROLES)
    linears = [linear for of_tensor in found.values() for linear in of_tensor]
    bits = allocate(linears, options.bits)
    average = mean_bits(linears, bits)
    if options.head_bits != UNQUANTIZED_HEAD:
        linears.append(_head(source, architecture))
        bits[LM_HEAD] = options.head_bits
    hessians = None if statistics is None else Hessians(statistics, linears)
    if hessians is not None:
        check_same_model(hessians.statistics, source)
    encoder = _encoder(options.device)
    writing = Writing(architecture.root, bits, options.codebook, hessians, encoder, options.device)
    steps = writing.steps(kept(source.tensors.values(), linears), linears)
    config = output.quantization_config(average, options.head_bits, options.codebook, _calibration(hessians))
    details: dict[str, Any] = {
        "quantization": config,
        "statistics": None if hessians is None else _provenance(hessians),
        "bits": by_role(linears, bits, steps),
        "linears": {module: {"bits": count, "seed": seed_of(module)} for module, count in bits.items()},
    }
    return Conversion(
        SCHEME,
        source,
        steps,
        {**source.config, "quantization_config": config},
        summarize(steps),
        max_shard_bytes,
        details,
        files={storage.FILE: output.storage_file(config, (tensor for step in steps for tensor in step.written))},
        settings={"device": options.device, "encoder": encoder},
        reads=() if statistics is None else (statistics,),
        conclude=partial(with_errors, linears, details),
        check_machine=partial(check_memory, linears, bits, statistics is not None, options.device),
    )


def _head(source: Checkpoint, architecture: TextArchitecture) -> Linear:
    """The output layer: the embedding's rows where it is tied, whatever else the file holds."""
    name = f"{architecture.root}embed_tokens.weight" if architecture.tie_word_embeddings else f"{LM_HEAD}.weight"
    tensor = source.tensors[name]
    if tensor.dtype not in FLOAT_DTYPES:
        raise InputError(f"tensor {name}: got {tensor.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
    return Linear(LM_HEAD, tensor, 0, tensor.rows)


def _encoder(device: str) -> str:
    """The fast search of a device: the definition would take a hundred times as long."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device}: torch sees no GPU")
    choice = choose_encoder(device)
    for name, reason in choice.refusals:
        raise InputError(f"device {device}: {name} cannot encode: {reason}")
    return choice.name


def _calibration(hessians: Hessians | None) -> tuple[int, int] | None:
    """Samples, and tokens of each at most."""
    if hessians is None:
        return None
    details = hessians.statistics.details
    return int(details["samples"]), int(details.get("max_length", 0))


def _provenance(hessians: Hessians) -> dict[str, Any]:
    """The statistics file: its name and size, for it is too large to hash, and how it was made."""
    path = hessians.statistics.path
    return {"name": path.name, "bytes": path.stat().st_size, **hessians.statistics.details}
