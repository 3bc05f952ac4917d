"""BF16 Gemma 4 checkpoint and statistics in, FP8 static checkpoint out: file to file, without a model object.

Attention, MLP and experts of the language model are quantized; everything else is copied bit for bit. A per-tensor
scale is needed before the first code, so planning reads every weight once (blocks of 4 MB) and converting reads it
again. Scales are part of the plan, so a resumed run, which measures again, writes the same bytes. Per-channel
scales are found row by row on the way and need no first pass.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gguf_mixed.tasks import Executor
from vllm_gemma4q.architecture import Role, parse_text_architecture, role_of
from vllm_gemma4q.calibration.identity import check_same_model
from vllm_gemma4q.calibration.statistics import Statistics, read_statistics
from vllm_gemma4q.checkpoint import Checkpoint, TensorInfo
from vllm_gemma4q.checkpoint.convert import Conversion
from vllm_gemma4q.checkpoint.rewrite import Progress
from vllm_gemma4q.checkpoint.steps import MAX_SHARD_BYTES, Constant, OutputTensor, Step
from vllm_gemma4q.conformance import check_unquantized
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.fp8_static import e4m3
from vllm_gemma4q.fp8_static.format import (
    INPUT_SCALE,
    MAX,
    SCALE_DTYPE,
    WEIGHT_DTYPE,
    Granularity,
    quantization_config,
    weight_scale_shape,
)
from vllm_gemma4q.fp8_static.inputs import InputScale, fallbacks, input_scales
from vllm_gemma4q.fp8_static.measure import n_bytes
from vllm_gemma4q.fp8_static.scales import SMALLEST_SCALE, Rule
from vllm_gemma4q.fp8_static.weights import WeightScale, weight_scales
from vllm_gemma4q.linears import Linear, linears_of_model, unquantized_linears
from vllm_gemma4q.module_headers import WEIGHT_SCALE
from vllm_gemma4q.summary import summarize

SCHEME = "fp8-static"
QUANTIZED_ROLES = frozenset({Role.ATTENTION, Role.MLP, Role.EXPERTS})


@dataclass(frozen=True)
class Options:
    """How scales are chosen. The defaults are the result of measurements: see README.md."""

    activations: Rule = Rule.ABSMAX
    weights: Rule = Rule.ABSMAX
    granularity: Granularity = Granularity.TENSOR

    def __post_init__(self) -> None:
        if self.granularity is Granularity.CHANNEL and self.weights is not Rule.ABSMAX:
            raise InputError(f"per-channel weights: got scale rule {self.weights}, expected {Rule.ABSMAX}")


def linears_to_quantize(source: Checkpoint) -> dict[str, list[Linear]]:
    """By their tensor's name, in the order of the checkpoint.

    Raises:
        InputError: not a Gemma 4, already quantized, or tensors are missing or have the wrong shape or dtype.
    """
    architecture = parse_text_architecture(source.config)
    if "quantization_config" in source.config:
        method = source.config["quantization_config"]
        raise InputError(f"config.json: already quantized ({method}), expected a BF16 checkpoint")
    check_unquantized(architecture, source.tensors)
    return linears_of_model(source.tensors, architecture, QUANTIZED_ROLES)


def bytes_to_measure(source: Checkpoint, options: Options) -> int:
    """What `plan` will read, for a progress bar."""
    if options.granularity is Granularity.CHANNEL:
        return 0
    return sum(n_bytes(linear) for linears in linears_to_quantize(source).values() for linear in linears)


def plan(
    source: Checkpoint,
    statistics: Path,
    options: Options | None = None,
    progress: Progress = lambda _: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: Executor | None = None,
) -> Conversion:
    """Choose every scale; reads the weights once (per-channel: not at all) and writes nothing.

    Args:
        statistics: file that `gemma4q calibrate` wrote for this model, whose own inputs decide scales.
        progress: called with the number of bytes read.
        workers: read the weights; None: this process does.

    Raises:
        InputError: see `linears_to_quantize`, `check_same_model`, `input_scales` and `weight_scales`.
    """
    options = options or Options()
    by_tensor = linears_to_quantize(source)
    linears = [linear for own in by_tensor.values() for linear in own]
    if options.granularity is Granularity.CHANNEL and any(role_of(n.module) is Role.EXPERTS for n in linears):
        raise InputError(f"weights {options.granularity}: vLLM takes experts with static inputs per tensor only")
    found = read_statistics(statistics)
    inputs = input_scales(linears, found, options.activations)
    check_same_model(found, source)
    weights = {}
    if options.granularity is Granularity.TENSOR:
        weights = weight_scales(linears, options.weights, progress, workers)
    steps = [
        step
        for tensor in source.tensors.values()
        for step in _steps(tensor, by_tensor.get(tensor.name, ()), weights, inputs)
    ]
    ignored = unquantized_linears(source, {linear.module for linear in linears})
    config = {**source.config, "quantization_config": quantization_config(ignored, options.granularity)}
    details = _details(options, found, weights, inputs)
    return Conversion(SCHEME, source, steps, config, summarize(steps), max_shard_bytes, details)


def _steps(
    tensor: TensorInfo,
    linears: Sequence[Linear],
    weights: Mapping[str, WeightScale],
    inputs: Mapping[str, InputScale],
) -> Iterator[Step]:
    if not linears:
        yield Step(tensor, (OutputTensor(tensor.name, tensor.dtype, tensor.shape),))
    for linear in linears:
        chosen = weights.get(linear.module)
        make = _per_channel if chosen is None else partial(_per_tensor, scale=chosen.scale)
        yield make(linear, _scalar(linear, INPUT_SCALE, inputs[linear.module].scale))


def _per_tensor(linear: Linear, input_scale: Constant, scale: float) -> Step:
    constants = (_scalar(linear, WEIGHT_SCALE, scale), input_scale)
    transform = partial(_quantize_tensor, scale)
    return Step(linear.tensor, (_codes(linear),), transform, linear.first, linear.last, constants)


def _per_channel(linear: Linear, input_scale: Constant) -> Step:
    shape = weight_scale_shape(Granularity.CHANNEL, linear.shape[0])
    scale = OutputTensor(f"{linear.module}.{WEIGHT_SCALE}", SCALE_DTYPE, shape)
    return Step(linear.tensor, (_codes(linear), scale), _quantize_channels, linear.first, linear.last, (input_scale,))


def _codes(linear: Linear) -> OutputTensor:
    return OutputTensor(f"{linear.module}.weight", WEIGHT_DTYPE, linear.shape)


def _scalar(linear: Linear, suffix: str, value: float) -> Constant:
    return Constant(OutputTensor(f"{linear.module}.{suffix}", SCALE_DTYPE, ()), struct.pack("<f", value))


def _quantize_tensor(scale: float, rows: torch.Tensor, out: Sequence[torch.Tensor]) -> None:
    e4m3.quantize(rows, scale, out=out[0])


def _quantize_channels(rows: torch.Tensor, out: Sequence[torch.Tensor]) -> None:
    codes, scale = out
    absmax = rows.abs().amax(dim=1, keepdim=True).float()
    if not bool(absmax.isfinite().all()):
        raise ValueError("got NaN or infinity, expected finite weights")
    torch.div(absmax, MAX, out=scale).clamp_min_(SMALLEST_SCALE)
    e4m3.quantize(rows, scale, out=codes)


def _details(
    options: Options, statistics: Statistics, weights: Mapping[str, WeightScale], inputs: Mapping[str, InputScale]
) -> dict[str, Any]:
    """For the manifest: rules, provenance, and by module what each scale is and what it costs."""
    return {
        "rules": {
            "activations": options.activations.value,
            "weights": options.weights.value,
            "granularity": options.granularity.value,
        },
        "statistics": {"name": statistics.path.name, "sha256": _sha256(statistics.path), **statistics.details},
        "fallbacks": fallbacks(inputs),
        "clipped": sum(scale.clipped for scale in weights.values()),
        "underflowed": sum(scale.underflowed for scale in weights.values()),
        "linears": {module: _linear_details(weights.get(module), scale) for module, scale in inputs.items()},
    }


def _linear_details(weight: WeightScale | None, activation: InputScale) -> dict[str, Any]:
    details: dict[str, Any] = {INPUT_SCALE: activation.scale, "input_saturated": activation.saturated}
    if weight is not None:
        details |= {
            WEIGHT_SCALE: weight.scale,
            "weight_absmax": weight.absmax,
            "weight_clipped": weight.clipped,
            "weight_underflowed": weight.underflowed,
        }
    return details


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
