"""Mixture of experts in INT8 W8A8: gated experts, weights quantized per row, activations per token.

    y = sum over k of topk_weights * W2[e] q(act(gate) * up),   [gate; up] = W13[e] q(x),   e = topk_ids

q() is the per-token quantization of `int8_scaled_mm`. Sums over K are exact int32, all else is float32; the sum over
experts is cast to the dtype of the input at its end.

    reference.py  oracle        cpu.py      the loop over active experts, plain and packed weights
    activation.py               routing.py  sorting tokens by expert

Not done here: routing itself, shared experts, biases, GPU kernels.
"""

import torch

from gemma4q_kernels.grouped_mm import cpu
from gemma4q_kernels.grouped_mm.activation import ACTIVATIONS
from gemma4q_kernels.grouped_mm.cpu import Experts

__all__ = ["ACTIVATIONS", "Experts", "moe_int8"]


def moe_int8(
    hidden: torch.Tensor,
    w13_q: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_q: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str = "gelu_tanh",
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run routed tokens through INT8 experts. For repeated use on a CPU, `Experts` is about 1.6 times as fast.

    Args:
        hidden: float [T, H].
        w13_q, w13_scale: int8 [E, 2I, H] (rows: gate, then up) and float32 [E, 2I].
        w2_q, w2_scale: int8 [E, H, I] and float32 [E, H].
        topk_weights: float [T, k].
        topk_ids: int [T, k], global expert ids; -1 marks an unused slot.
        activation: one of `ACTIVATIONS`.
        expert_map: int [global experts] -> local id in [0, E), or -1 for an expert of another rank, which then
            contributes zero. None: ids are local.

    Returns:
        [T, H] of the dtype of `hidden`.

    Raises:
        ValueError: shapes or dtypes that do not fit, ids out of range, an unknown activation.
    """
    return cpu.moe_int8(hidden, w13_q, w13_scale, w2_q, w2_scale, topk_weights, topk_ids, activation, expert_map)
