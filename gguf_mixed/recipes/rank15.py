"""The published IQ4_NL/IQ3_S rule: embeddings Q5_K, attention IQ4_NL, feed-forward ranked, the top 15% IQ4_NL.

Two scores. `rank15-legacy` is the published one, the mean absolute weight: called imatrix-driven where it was
published, though it reads no imatrix, and without relation to what quantizing a tensor costs (Spearman 0.05 over 126
tensors of Gemma 3 270M). `rank15` ranks by a real imatrix: the mean squared input of a channel. Neither is a good
predictor; they are here to be compared with. Block tensors that are neither attention nor feed-forward get IQ4_NL.
"""

from collections.abc import Mapping

import numpy as np
from gemma4q_kernels.ggml import GGMLQuantizationType, row_bytes
from gguf.quants import dequantize

from gguf_mixed.errors import InputError
from gguf_mixed.recipes.base import Choice, Material, is_embedding, is_feed_forward, quantizable
from gguf_mixed.tensors import Inventory, Tensor

T = GGMLQuantizationType

EMBEDDING_TYPE, HIGH_TYPE, LOW_TYPE = T.Q5_K, T.IQ4_NL, T.IQ3_S
TOP_PERCENT = 15  # of the feed-forward tensors, counted, not weighed; rounded down
_CHUNK_BYTES = 32 << 20


def rank15(material: Material) -> Choice:
    """Rank by the mean squared input a channel sees, over all experts.

    Raises:
        InputError: no imatrix, or one without data for a feed-forward tensor.
    """
    imatrix = material.require_imatrix("rank15")
    scores = {}
    for tensor in _ranked_tensors(material.inventory):
        entry = imatrix.entries.get(tensor.name)
        if entry is None or not entry.counts.any():
            raise InputError(f"tensor {tensor.name}: the imatrix has no data for it, and rank15 ranks by that")
        scores[tensor.name] = float(entry.sums.sum(dtype=np.float64) / entry.counts.sum() / tensor.row_length)
    return _assign(material.inventory, scores, "imatrix: mean squared input")


def rank15_legacy(material: Material) -> Choice:
    """Rank by the mean absolute weight, as published.

    Raises:
        InputError: the file holds no weights, or in a type that cannot be read.
    """
    inventory = material.inventory
    if inventory.header_only:
        raise InputError(f"{inventory.path.name}: holds no weights, and rank15-legacy ranks by them")
    scores = {tensor.name: mean_abs(tensor) for tensor in _ranked_tensors(inventory)}
    return _assign(inventory, scores, "legacy: mean absolute weight, no imatrix")


def mean_abs(tensor: Tensor) -> float:
    """Mean absolute weight of a tensor, read in pieces of _CHUNK_BYTES.

    Raises:
        InputError: a type that the gguf package cannot dequantize.
    """
    n_bytes = row_bytes(tensor.qtype, tensor.row_length)
    rows = tensor.n_elements // tensor.row_length
    stored = np.memmap(tensor.path, np.uint8, "r", tensor.start, (rows, n_bytes))
    step = max(1, _CHUNK_BYTES // n_bytes)
    total = 0.0
    for first in range(0, rows, step):
        try:
            values = dequantize(np.ascontiguousarray(stored[first : first + step]), tensor.qtype)
        except NotImplementedError as error:
            raise InputError(f"tensor {tensor.name}: {tensor.qtype.name} weights cannot be read") from error
        total += float(np.abs(values).sum(dtype=np.float64))
    return total / tensor.n_elements


def _ranked_tensors(inventory: Inventory) -> list[Tensor]:
    return [tensor for tensor in quantizable(inventory) if is_feed_forward(tensor)]


def _assign(inventory: Inventory, scores: Mapping[str, float], label: str) -> Choice:
    """Types by rank; of equal scores, the earlier in the file is first."""
    ranked = sorted(scores, key=lambda name: -scores[name])
    top = set(ranked[: len(ranked) * TOP_PERCENT // 100])
    types = {}
    for tensor in quantizable(inventory):
        if is_embedding(tensor):
            types[tensor.name] = EMBEDDING_TYPE
        else:
            types[tensor.name] = LOW_TYPE if tensor.name in scores and tensor.name not in top else HIGH_TYPE
    return Choice(types, {"score": label, "top": [name for name in ranked if name in top]})
