"""Scores of experts from their weights alone: no calibration, one tensor's experts in memory at a time."""

from collections.abc import Callable, Mapping

import numpy as np

from vllm_gemma4q.architecture import Role, is_fused_experts, layer_index, role_of
from vllm_gemma4q.calibration.statistics import Array
from vllm_gemma4q.calibration.weights import read_rows
from vllm_gemma4q.checkpoint import Checkpoint
from vllm_gemma4q.conformance import check_unquantized
from vllm_gemma4q.linears import linears_of
from vllm_gemma4q.pruned_moe.mixture import mixture_of

Progress = Callable[[int], object]
# Of one expert: sum of |w|, sum of w^2, number of weights.
_Sums = Array


def aimer(sums: _Sums) -> Array:
    """mean |w| over the root mean square of w: even weights matter more than peaked ones (arXiv 2603.18492)."""
    return np.asarray(sums[..., 0] / np.sqrt(np.maximum(sums[..., 1] * sums[..., 2], 1e-300)))


def magnitude(sums: _Sums) -> Array:
    """Root of the sum of w^2: the baseline of all pruning."""
    return np.asarray(np.sqrt(sums[..., 1]))


WEIGHT_RECIPES: Mapping[str, Callable[[_Sums], Array]] = {"aimer": aimer, "magnitude": magnitude}


def expert_bytes(source: Checkpoint) -> int:
    """Bytes of all experts: what `weight_sums` reads."""
    return sum(tensor.end - tensor.start for tensor in source.tensors.values() if role_of(tensor.name) is Role.EXPERTS)


def weight_sums(source: Checkpoint, progress: Progress = lambda n_bytes: None) -> _Sums:
    """float64 [layers, experts, 3]: sum of |w|, sum of w^2 and number of weights of each expert.

    Args:
        progress: called with the number of bytes read.

    Raises:
        InputError: a dense model, a quantized one, or tensors are missing or have the wrong shape or dtype.
    """
    architecture, num_experts, _ = mixture_of(source.config)
    check_unquantized(architecture, source.tensors)
    sums = np.zeros((len(architecture.layers), num_experts, 3))
    for tensor in source.tensors.values():
        if role_of(tensor.name) is not Role.EXPERTS:
            continue
        layer = layer_index(tensor.name)
        entries = range(tensor.shape[0]) if is_fused_experts(tensor.name) else [None]
        for entry in entries:
            expert = next(linears_of(tensor)).inputs[1] if entry is None else entry
            weights = read_rows(tensor) if entry is None else read_rows(tensor, entry, entry + 1)
            absolute, squared = weights.float().abs(), weights.float().square()
            sums[layer, expert] += [float(absolute.sum()), float(squared.sum()), weights.numel()]
            progress(weights.nbytes)
    return sums
