"""BF16 Gemma 4 checkpoint in, Quark W8A8 INT8 checkpoint out: file to file, on a CPU, without a model object.

Every linear of the language model is quantized, fused 3-D experts into one weight and one scale an expert
(the layout vLLM loads). Everything else is copied bit for bit. No calibration: activations are quantized
while serving.
"""

from collections.abc import Iterator, Sequence

import torch
from gemma4q_kernels.int8_scaled_mm import quantize_per_channel

from vllm_gemma4q.architecture import Role, is_fused_experts, is_linear_weight, parse_text_architecture, role_of
from vllm_gemma4q.checkpoint import Checkpoint, OutputTensor, Step, TensorInfo
from vllm_gemma4q.checkpoint.convert import Conversion
from vllm_gemma4q.checkpoint.rewrite import MAX_SHARD_BYTES
from vllm_gemma4q.conformance import check_unquantized
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.quark_int8.format import quantization_config
from vllm_gemma4q.summary import summarize

SCHEME = "quark-int8"
_NEVER_LINEAR = frozenset({Role.EMBEDDING, Role.NORM, Role.OTHER})


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
    steps = [step for tensor in source.tensors.values() for step in _steps(tensor)]
    config = {**source.config, "quantization_config": quantization_config(_exclude(source))}
    return Conversion(SCHEME, source, steps, config, summarize(steps), max_shard_bytes)


def _steps(tensor: TensorInfo) -> Iterator[Step]:
    if not is_linear_weight(tensor.name, tensor.shape):
        yield Step(tensor, (OutputTensor(tensor.name, tensor.dtype, tensor.shape),))
    elif is_fused_experts(tensor.name):
        yield from _expert_steps(tensor)
    else:
        yield _quantize_rows(tensor, tensor.name.removesuffix(".weight"), 0, tensor.rows)


def _expert_steps(tensor: TensorInfo) -> Iterator[Step]:
    """One step for each expert's linear: `gate_up_proj` [E, 2I, H] holds the gate's rows, then the up's."""
    prefix, _, fused = tensor.name.rpartition(".")
    linears = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
    experts, rows, _ = tensor.shape
    height = rows // len(linears)
    for expert in range(experts):
        for position, linear in enumerate(linears):
            first = expert * rows + position * height
            yield _quantize_rows(tensor, f"{prefix}.{expert}.{linear}", first, first + height)


def _quantize_rows(tensor: TensorInfo, module: str, first: int, last: int) -> Step:
    weight = OutputTensor(f"{module}.weight", "I8", (last - first, tensor.row_length))
    scale = OutputTensor(f"{module}.weight_scale", "F32", (last - first,))
    return Step(tensor, (weight, scale), _transform, first, last)


def _transform(rows: torch.Tensor, out: Sequence[torch.Tensor]) -> None:
    weight, scale = out
    quantize_per_channel(rows, out=(weight, scale))


def _exclude(source: Checkpoint) -> list[str]:
    """Full names of the linears that stay as they are; `lm_head` also when it is tied and has no tensor."""
    linears = {
        name.removesuffix(".weight")
        for name, tensor in source.tensors.items()
        if name.endswith(".weight")
        and len(tensor.shape) == 2
        and not is_linear_weight(name, tensor.shape)
        and role_of(name) not in _NEVER_LINEAR
    }
    return sorted(linears | {"lm_head"})
