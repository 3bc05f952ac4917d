"""Mixture of experts in FP8 with static scales: pairs sorted by expert, two multiplications for each active expert.

    y = sum over k of topk_weights * W2[e] q2(act(gate) * up),   [gate; up] = W13[e] q1(x),   e = topk_ids

q1 and q2 round to E4M3 with one scale each, the same for all experts of a layer, as vLLM's kernels have it. Codes are
decoded an expert at a time; everything else is float32, and the sum over experts is cast at its end. Any device; on
GPUs with FP8 instructions an engine's own kernels are far faster. While a CUDA graph is captured, all experts see all
tokens (`grouped_mm/routing.py`).
"""

import torch

from gemma4q_kernels.fp8_scaled_mm.cpu import accumulate
from gemma4q_kernels.fp8_scaled_mm.problem import check_scale
from gemma4q_kernels.fp8_scaled_mm.quantize import E4M3, decode, quantize_static
from gemma4q_kernels.grouped_mm.activation import activate
from gemma4q_kernels.grouped_mm.cpu import check_batch
from gemma4q_kernels.grouped_mm.routing import shares


def moe_fp8(
    hidden: torch.Tensor,
    w13_q: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_q: torch.Tensor,
    w2_scale: torch.Tensor,
    w13_input_scale: torch.Tensor,
    w2_input_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str = "gelu_tanh",
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run routed tokens through FP8 experts.

    Args:
        hidden: float [T, H].
        w13_q, w13_scale: E4M3 [E, 2I, H] (rows: gate, then up) and float32 [E, 2I].
        w2_q, w2_scale: E4M3 [E, H, I] and float32 [E, H].
        w13_input_scale, w2_input_scale: float32, one element each.
        topk_weights: float [T, k].
        topk_ids: int [T, k], global expert ids; -1 marks an unused slot.
        activation: one of `gemma4q_kernels.grouped_mm.ACTIVATIONS`.
        expert_map: int [global experts] -> local id in [0, E), or -1 for an expert of another rank, which then
            contributes zero. None: ids are local.

    Returns:
        [T, H] of the dtype of `hidden`.

    Raises:
        ValueError: shapes or dtypes that do not fit, ids out of range, an unknown activation.
    """
    check_experts(w13_q, w13_scale, w2_q, w2_scale)
    check_scale(w13_input_scale)
    check_scale(w2_input_scale)
    check_batch(hidden, w2_q.shape[1], topk_weights, topk_ids)
    x = decode(quantize_static(hidden, w13_input_scale))
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for share in shares(topk_weights, topk_ids, len(w13_q), expert_map):
        expert = share.expert
        rows = _product(share.of(x), w13_input_scale, w13_q[expert], w13_scale[expert])
        gate, up = rows.chunk(2, dim=1)
        inner = decode(quantize_static(activate(gate, activation) * up, w2_input_scale))
        share.add(out, _product(inner, w2_input_scale, w2_q[expert], w2_scale[expert]))
    return out.to(hidden.dtype)


def _product(x: torch.Tensor, x_scale: torch.Tensor, w_q: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """Decoded float32 [P, K] times E4M3 [N, K], scaled: float32 [P, N]."""
    return accumulate(x, w_q).mul_(x_scale.reshape(()) * w_scale.reshape(-1, 1)).t().contiguous()


def check_experts(w13_q: torch.Tensor, w13_scale: torch.Tensor, w2_q: torch.Tensor, w2_scale: torch.Tensor) -> None:
    """Raises ValueError where the four tensors of a layer's experts do not fit each other."""
    if w13_q.dim() != 3 or w2_q.dim() != 3 or w13_q.dtype != E4M3 or w2_q.dtype != E4M3:
        raise ValueError(
            f"experts: got {w13_q.dtype} {tuple(w13_q.shape)} and {w2_q.dtype} {tuple(w2_q.shape)}, "
            f"expected {E4M3} [E, 2I, H] and [E, H, I]"
        )
    experts, rows, hidden = w13_q.shape
    if rows % 2 or tuple(w2_q.shape) != (experts, hidden, rows // 2):
        raise ValueError(f"w2_q: got {tuple(w2_q.shape)}, expected [E, H, I] of w13_q {tuple(w13_q.shape)}")
    for name, scale, weight in (("w13_scale", w13_scale, w13_q), ("w2_scale", w2_scale, w2_q)):
        if scale.dtype != torch.float32 or scale.shape != weight.shape[:2]:
            raise ValueError(
                f"{name}: got {scale.dtype} {tuple(scale.shape)}, expected float32 {tuple(weight.shape[:2])}"
            )
