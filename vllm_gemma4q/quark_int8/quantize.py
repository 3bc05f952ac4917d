"""BF16 Gemma 4 checkpoint in, Quark W8A8 INT8 checkpoint out: file to file, on a CPU, without a model object.

Every linear of the language model is quantized, fused 3-D experts into one weight and one scale an expert
(the layout vLLM loads). Everything else is copied bit for bit. No calibration: activations are quantized
while serving.
"""

from collections.abc import Iterator, Sequence

import torch
from gemma4q_kernels.int8_scaled_mm import quantize_per_channel

from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.checkpoint import Checkpoint, TensorInfo
from vllm_gemma4q.checkpoint.convert import Conversion
from vllm_gemma4q.checkpoint.steps import MAX_SHARD_BYTES, OutputTensor, Step
from vllm_gemma4q.conformance import check_unquantized
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.linears import Linear, linears_of_model, unquantized_linears
from vllm_gemma4q.quark_int8.format import quantization_config
from vllm_gemma4q.summary import summarize

SCHEME = "quark-int8"


def plan(source: Checkpoint, max_shard_bytes: int = MAX_SHARD_BYTES) -> Conversion:
    """What quantizing a checkpoint will read and write; nothing is written yet.

    Raises:
        InputError: not a Gemma 4, already quantized, or tensors are missing or have the wrong shape or dtype.
    """
    architecture = parse_text_architecture(source.config)
    if "quantization_config" in source.config:
        method = source.config["quantization_config"]
        raise InputError(f"config.json: already quantized ({method}), expected a BF16 checkpoint")
    check_unquantized(architecture, source.tensors)
    linears = linears_of_model(source.tensors, architecture)
    steps = [step for tensor in source.tensors.values() for step in _steps(tensor, linears.get(tensor.name, ()))]
    quantized = {linear.module for own in linears.values() for linear in own}
    config = {**source.config, "quantization_config": quantization_config(unquantized_linears(source, quantized))}
    return Conversion(SCHEME, source, steps, config, summarize(steps), max_shard_bytes)


def _steps(tensor: TensorInfo, linears: Sequence[Linear]) -> Iterator[Step]:
    if not linears:
        yield Step(tensor, (OutputTensor(tensor.name, tensor.dtype, tensor.shape),))
    for linear in linears:
        weight = OutputTensor(f"{linear.module}.weight", "I8", linear.shape)
        scale = OutputTensor(f"{linear.module}.weight_scale", "F32", linear.shape[:1])
        yield Step(tensor, (weight, scale), _transform, linear.first, linear.last)


def _transform(rows: torch.Tensor, out: Sequence[torch.Tensor]) -> None:
    weight, scale = out
    quantize_per_channel(rows, out=(weight, scale))
