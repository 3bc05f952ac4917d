"""The oracle of the INT8 mixture of experts: float64, one token and one expert at a time. Any device, very slow."""

import torch

from gemma4q_kernels.grouped_mm.activation import activate


def _quantized(x: torch.Tensor) -> torch.Tensor:
    """A float32 vector through INT8 with one scale and back, as float64."""
    scale = x.float().abs().max().clamp_min(1e-10) / 127.0
    return (x.float() * (1.0 / scale)).round().double() * scale.double()


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
    """See `gemma4q_kernels.grouped_mm.moe_int8`; returns float64 [T, H]."""
    out = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for token in range(hidden.shape[0]):
        x = _quantized(hidden[token])
        for slot in range(topk_ids.shape[1]):
            expert = int(topk_ids[token, slot])
            if expert_map is not None and expert >= 0:
                expert = int(expert_map[expert])
            if expert < 0:
                continue
            gate_up = (w13_q[expert].double() * w13_scale[expert].double().reshape(-1, 1)) @ x
            gate, up = gate_up.chunk(2)
            # The intermediate is rounded to float32 before it is quantized: that much is part of the definition.
            y = _quantized((activate(gate, activation) * up).float())
            down = (w2_q[expert].double() * w2_scale[expert].double().reshape(-1, 1)) @ y
            out[token] += topk_weights[token, slot].double() * down
    return out
