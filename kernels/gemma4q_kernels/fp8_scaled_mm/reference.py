"""The oracles: FP8 products summed in float64, scaled in float64, cast once. Slow, any device."""

import torch

from gemma4q_kernels.fp8_scaled_mm.problem import Problem
from gemma4q_kernels.fp8_scaled_mm.quantize import quantize_static
from gemma4q_kernels.grouped_mm.activation import activate
from gemma4q_kernels.support import YES, Support


def can_implement(problem: Problem) -> Support:
    """Always."""
    return YES


def scaled_mm(
    x_q: torch.Tensor,
    input_scale: torch.Tensor,
    w_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """See `gemma4q_kernels.fp8_scaled_mm.scaled_mm`."""
    out = x_q.double() @ w_q.double().t() * input_scale.double().reshape(()) * weight_scale.double().reshape(1, -1)
    if bias is not None:
        out += bias.double()
    return out.to(out_dtype)


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
    """See `gemma4q_kernels.fp8_scaled_mm.moe_fp8`; one token and one expert at a time; returns float64 [T, H]."""
    out = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for token in range(hidden.shape[0]):
        x = quantize_static(hidden[token], w13_input_scale).double() * w13_input_scale.double()
        for slot in range(topk_ids.shape[1]):
            expert = int(topk_ids[token, slot])
            expert = expert if expert_map is None else int(expert_map[expert])
            if expert < 0:
                continue
            gate, up = ((w13_q[expert].double() * w13_scale[expert].double().unsqueeze(1)) @ x).chunk(2)
            # The intermediate is rounded to float32 before it is quantized: that much is part of the definition.
            inner = quantize_static((activate(gate, activation) * up).float(), w2_input_scale)
            y = inner.double() * w2_input_scale.double()
            down = (w2_q[expert].double() * w2_scale[expert].double().unsqueeze(1)) @ y
            out[token] += topk_weights[token, slot].double() * down
    return out
