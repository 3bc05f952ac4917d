"""Tensors that a published model would have in a format, by its shapes: sizes before anything is written.

BF16: as published, vision tower included. INT8 and FP8: linears of the language model a byte a weight, experts one by
one, with an F32 scale a row (INT8), or a weight's and an input's (FP8, per tensor). EXL3: every linear and the output
layer packed, both sides padded to blocks of 128, with `suh` and `svh`; the embedding stays BF16 and the head no longer
is it. A fractional number of bits is the mean over the body: which linear gets which is up to the writer.
"""

import math
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

from gemma4q_kernels.exl3_layout import Span

from vllm_gemma4q.architecture import TextArchitecture, is_fused_experts, is_linear_weight
from vllm_gemma4q.vram.weights import TRELLIS, StoredTensor

PUBLISHED_WINDOW = 1024
PUBLISHED_CONTEXT = 262144
# Of both models (27 layers, 1152 wide, 4304 inside): transformers' Gemma4VisionModel, standardizing, counted.
VISION_WIDTH = 1152
VISION_PARAMETERS = 569_548_080 + 2 * VISION_WIDTH
UNQUANTIZED_BITS = 16
_BF16, _F16, _F32, _MARKER = 2, 2, 4, 4


class Scheme(StrEnum):
    """Formats whose sizes follow from shapes."""

    BF16 = "bf16"
    QUARK_INT8 = "quark-int8"
    FP8_STATIC = "fp8-static"
    EXL3 = "exl3"


def published_config(sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration that decides sizes, with the window and the context of the published models."""
    return {"sliding_window": PUBLISHED_WINDOW, "max_position_embeddings": PUBLISHED_CONTEXT, **sizes}


def planned_tensors(
    architecture: TextArchitecture, scheme: Scheme, bits: float, head_bits: float
) -> Iterator[StoredTensor]:
    """Every tensor of a published model in a format.

    Args:
        bits, head_bits: bits a weight of the body and of the output layer; EXL3 only. A head of `UNQUANTIZED_BITS` is
            the embedding.
    """
    for name, shape in architecture.shapes():
        if scheme is not Scheme.BF16 and is_linear_weight(name, shape):
            for module, out_features, in_features in _linears(name, shape):
                yield from _linear(module, out_features, in_features, scheme, bits)
        else:
            yield StoredTensor(name, shape, _BF16 * math.prod(shape))
    if scheme is Scheme.EXL3 and head_bits < UNQUANTIZED_BITS:
        yield from _linear("lm_head", architecture.vocab_size, architecture.hidden_size, scheme, head_bits)
    projection = (architecture.hidden_size, VISION_WIDTH)
    yield StoredTensor("model.vision_tower.encoder", (VISION_PARAMETERS,), _BF16 * VISION_PARAMETERS)
    yield StoredTensor("model.embed_vision.embedding_projection.weight", projection, _BF16 * math.prod(projection))


def _linears(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int, int]]:
    """Module, outputs and inputs of the linears that a BF16 tensor holds."""
    if not is_fused_experts(name):
        yield name.removesuffix(".weight"), shape[0], shape[1]
        return
    experts, out_features, in_features = shape
    parent, _, fused = name.rpartition(".")
    shards = ("down_proj",) if fused == "down_proj" else ("gate_proj", "up_proj")
    for expert in range(experts):
        for shard in shards:
            yield f"{parent}.{expert}.{shard}", out_features // len(shards), in_features


def _linear(module: str, out_features: int, in_features: int, scheme: Scheme, bits: float) -> Iterator[StoredTensor]:
    if scheme is Scheme.EXL3:
        rows, columns = Span(0, out_features).covered, Span(0, in_features).covered
        yield StoredTensor(module + TRELLIS, (rows, columns), round(rows * columns * bits / 8))
        yield StoredTensor(f"{module}.suh", (columns,), _F16 * columns)
        yield StoredTensor(f"{module}.svh", (rows,), _F16 * rows)
        yield StoredTensor(f"{module}.mcg", (), _MARKER)
        return
    yield StoredTensor(f"{module}.weight", (out_features, in_features), out_features * in_features)
    rows = out_features if scheme is Scheme.QUARK_INT8 else 1
    yield StoredTensor(f"{module}.weight_scale", (rows,), _F32 * rows)
    if scheme is Scheme.FP8_STATIC:
        yield StoredTensor(f"{module}.input_scale", (), _F32)
