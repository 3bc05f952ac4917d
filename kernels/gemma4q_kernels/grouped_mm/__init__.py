"""Mixture of experts in INT8 W8A8: gated experts, weights quantized per row, activations per token.

    y = sum over k of topk_weights * W2[e] q(act(gate) * up),   [gate; up] = W13[e] q(x),   e = topk_ids

q() is the per-token quantization of `int8_scaled_mm`. Sums over K are exact int32, all arithmetic else is float32; the
sum over experts is cast to the dtype of the input at its end.

    reference.py  oracle                         cpu.py      the loop over active experts, plain and packed weights
    dispatch.py   which backend, and why         routing.py  sorting tokens by expert, for that loop
    activation.py                                triton.py   GPUs: grouped multiplications (triton_routing.py: sorting;
                                                             tiles.py, configs/: its tiles)

Not done here: routing itself, shared experts, biases.
"""

import torch

from gemma4q_kernels.grouped_mm.activation import ACTIVATIONS
from gemma4q_kernels.grouped_mm.cpu import Experts, check_batch, check_experts
from gemma4q_kernels.grouped_mm.dispatch import BACKENDS, backend_module, choose

__all__ = ["ACTIVATIONS", "BACKENDS", "Experts", "choose", "moe_int8"]


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
    backend: str = "auto",
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
        backend: "auto" or one of `BACKENDS`. "triton" holds values between the steps in the dtype of `hidden`, and
            takes ids out of range for unused slots.

    Returns:
        [T, H] of the dtype of `hidden`.

    Raises:
        ValueError: shapes or dtypes that do not fit, ids out of range ("loop" only), an unknown activation, a
            backend that cannot run this.
    """
    check_experts(w13_q, w13_scale, w2_q, w2_scale)
    check_batch(hidden, w2_q.shape[1], topk_weights, topk_ids)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {list(ACTIVATIONS)}")
    choice = choose(hidden.device, len(hidden), w2_q.shape[2], w2_q.shape[1], hidden.dtype, backend)
    out: torch.Tensor = backend_module(choice.name).moe_int8(
        hidden, w13_q, w13_scale, w2_q, w2_scale, topk_weights, topk_ids, activation, expert_map
    )
    return out
