"""Bytes of weights on one rank, from the names and sizes of tensors alone.

Weights are taken as the file holds them. vLLM splits q, k, v, gate and up by outputs, o and down by inputs, embeddings
and output layer by vocabulary; the rest is on every rank: norms, router, vision and audio. Scales go with what they
scale: those of split outputs are split, those of split inputs are not; EXL3's `suh` belongs to inputs, `svh` to
outputs. Key heads fewer than ranks are repeated. Where V equals K, vLLM loads K twice.

EXL3 is served by this package's plugin, which keeps weights packed, holds one K for both, and gives each rank every
block of 128 features that it touches: what counts is the rank with most (`gemma4q_kernels.exl3.slicing`).

Source: vLLM 0.32 `model_executor/models/gemma4.py`, `gemma4_mm.py`, `layers/linear.py`.
Not done here: expert parallelism, splits of per-layer inputs, what an engine repacks or dequantizes while loading.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from gemma4q_kernels.exl3_layout import Span

from vllm_gemma4q.architecture import Role, TextArchitecture, layer_index, role_of
from vllm_gemma4q.errors import InputError

TRELLIS = ".trellis"
_PARALLEL = re.compile(r"\.(?P<linear>[a-z_]*[a-z]_proj)(?:[._](?P<parameter>[a-z_]+))?$")
_SPLIT_BY_INPUT = frozenset({"o_proj", "down_proj"})
_KEY_VALUE = frozenset({"k_proj", "v_proj"})
_ALWAYS_SPLIT = frozenset({"weight", "trellis"})
_OF_OUTPUTS, _OF_INPUTS = frozenset({"svh", "sv", "bias"}), frozenset({"suh", "su"})
_EXL3 = frozenset({"trellis", "suh", "su", "svh", "sv", "mcg", "mul1"})


class Part(StrEnum):
    """What weights are for, as a table tells them apart."""

    BODY = "body"
    HEAD = "head"
    EMBEDDING = "embedding"
    VISION = "vision"
    OTHER = "norms and router"


_PARTS = {
    Role.ATTENTION: Part.BODY,
    Role.MLP: Part.BODY,
    Role.EXPERTS: Part.BODY,
    Role.PER_LAYER_INPUT: Part.BODY,
    Role.LM_HEAD: Part.HEAD,
    Role.EMBEDDING: Part.EMBEDDING,
    Role.VISION: Part.VISION,
    Role.EMBED_VISION: Part.VISION,
    Role.AUDIO: Part.VISION,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor by its Hugging Face name, as a file holds it or would."""

    name: str
    shape: tuple[int, ...]
    n_bytes: int


def stored_bytes(tensors: Iterable[StoredTensor]) -> dict[Part, int]:
    """Bytes of each part in the file: what an engine on one GPU holds that loads every tensor once."""
    sizes: Counter[Part] = Counter()
    for tensor in tensors:
        sizes[_part(tensor)] += tensor.n_bytes
    return _ordered(sizes)


def vllm_bytes(architecture: TextArchitecture, tensors: Iterable[StoredTensor], ranks: int = 1) -> dict[Part, int]:
    """Bytes of each part on one of vLLM's ranks, the one with most.

    Raises:
        InputError: something does not divide among the ranks.
    """
    _check_ranks(architecture, ranks)
    sizes: Counter[Part] = Counter()
    for tensor in tensors:
        sizes[_part(tensor)] += _rank_bytes(architecture, tensor, ranks)
    return _ordered(sizes)


def _part(tensor: StoredTensor) -> Part:
    return _PARTS.get(role_of(tensor.name), Part.OTHER)


def _ordered(sizes: Mapping[Part, int]) -> dict[Part, int]:
    return {part: sizes[part] for part in Part if part in sizes}


def _rank_bytes(architecture: TextArchitecture, tensor: StoredTensor, ranks: int) -> int:
    role = role_of(tensor.name)
    if role is Role.EMBEDDING:
        return -(-tensor.n_bytes // ranks)
    if role is Role.LM_HEAD:
        return _share(tensor, "lm_head", tensor.name.rpartition(".")[2], architecture.vocab_size, ranks)
    match = _PARALLEL.search(tensor.name)
    if role not in (Role.ATTENTION, Role.MLP, Role.EXPERTS) or match is None:
        return tensor.n_bytes
    linear, parameter = match["linear"], match["parameter"] or "weight"
    index, layers = layer_index(tensor.name), len(architecture.layers)
    if index >= layers:
        raise InputError(f"tensor {tensor.name}: got layer {index}, expected 0..{layers - 1}, as config.json says")
    layer = architecture.layers[index]
    if role is Role.MLP:
        return _share(tensor, linear, parameter, layer.intermediate_size, ranks)
    if role is Role.EXPERTS:
        return _share(tensor, linear, parameter, architecture.moe_intermediate_size or 0, ranks)
    if linear not in _KEY_VALUE:
        return _share(tensor, linear, parameter, architecture.num_attention_heads * layer.head_dim, ranks)
    heads = layer.num_key_value_heads
    copies = 1 if layer.has_value or parameter in _EXL3 else 2
    return copies * _share(tensor, linear, parameter, heads * layer.head_dim, min(ranks, heads))


def _share(tensor: StoredTensor, linear: str, parameter: str, features: int, shares: int) -> int:
    """Bytes of the largest of equal shares of the features by which a linear is split."""
    if shares == 1 or not _is_split(linear, parameter, tensor.shape):
        return tensor.n_bytes
    if parameter not in _EXL3:
        return -(-tensor.n_bytes // shares)
    local = features // shares
    most = max(Span(rank * local, local).covered for rank in range(shares))
    return -(-tensor.n_bytes * most // Span(0, features).covered)


def _is_split(linear: str, parameter: str, shape: tuple[int, ...]) -> bool:
    if parameter in _ALWAYS_SPLIT:
        return True
    if linear in _SPLIT_BY_INPUT:
        return parameter in _OF_INPUTS
    return parameter in _OF_OUTPUTS or ("weight_scale" in parameter and math.prod(shape) > 1)


def _check_ranks(architecture: TextArchitecture, ranks: int) -> None:
    sizes = {"num_attention_heads": architecture.num_attention_heads}
    for layer in architecture.layers:
        sizes["intermediate_size"] = layer.intermediate_size
        heads = layer.num_key_value_heads
        if heads % ranks and ranks % heads:
            raise InputError(
                f"-tp {ranks}: layer {layer.index} has {heads} key heads, expected a multiple or a divisor of {ranks}"
            )
    if architecture.moe_intermediate_size is not None:
        sizes["moe_intermediate_size"] = architecture.moe_intermediate_size
    for key, size in sizes.items():
        if size % ranks:
            raise InputError(f"-tp {ranks}: {key} = {size} does not divide among {ranks} ranks")
