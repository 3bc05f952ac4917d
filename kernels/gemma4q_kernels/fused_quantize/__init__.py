"""Two memory-bound steps that end in per-token INT8, each in one pass over its input.

    rms_norm_quantize   residual' = x + residual,  q(norm(residual') * weight)      in front of qkv and gate_up
    gated_quantize      q(act(gate) * up)                                           in front of down

q() is `int8_scaled_mm.quantize_per_token`, to the bit for equal float32 input. Gemma 4 norms a block's output before it
is added (post_attention_layernorm); `input_weight` folds that norm in as well. Its norms multiply by the weight itself.

Unfused, values pass through 16-bit tensors on the way. `rounding` chooses which of these roundings are kept:

    "none"   float32 up to q(): the most accurate
    "once"   the value that q() sees is rounded to the dtype of x, as in transformers
    "twice"  so is its first factor, norm(..) or act(gate), as in vLLM's kernels (transformers' too for act(gate))

    reference.py  unfused, any device        triton.py  GPUs, one program a row        problem.py  sizes and checks

Not done here: static scales, groups, the scalar that Gemma 4 multiplies a layer's output with.
"""

import torch

from gemma4q_kernels.fused_quantize.dispatch import BACKENDS, backend_module, choose
from gemma4q_kernels.fused_quantize.problem import ROUNDINGS, Normed, check_gated, check_norm

__all__ = ["BACKENDS", "ROUNDINGS", "Normed", "choose", "gated_quantize", "rms_norm_quantize"]


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    input_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    rounding: str = "none",
    backend: str = "auto",
) -> Normed:
    """Add a residual, take the RMS norm, and quantize per token.

    Args:
        x: float [T, H].
        weight: float [H], multiplied as it is (not 1 + weight).
        residual: [T, H] of the dtype of `x`, or None: nothing is added.
        input_weight: float [H] of a norm that `x` goes through before the addition, or None. Needs a residual.
        eps: added to the mean square.
        rounding: one of `ROUNDINGS`. The norm reads the sum as it is stored, rounded, whichever is chosen.
        backend: "auto" or one of `BACKENDS`.

    Returns:
        q int8 [T, H], scale float32 [T, 1], residual [T, H] (x + residual; None without one).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an unknown rounding; a backend that cannot run this.
    """
    check_norm(x, weight, residual, input_weight, rounding)
    choice = choose(x.device, x.shape[0], x.shape[1], x.shape[1], x.dtype, backend)
    result: Normed = backend_module(choice.name).rms_norm_quantize(x, weight, residual, input_weight, eps, rounding)
    return result


def gated_quantize(
    gate_up: torch.Tensor, activation: str = "gelu_tanh", *, rounding: str = "none", backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize act(gate) * up per token.

    Args:
        gate_up: float [T, 2I]: gate, then up.
        activation: one of `gemma4q_kernels.grouped_mm.ACTIVATIONS`.
        rounding: one of `ROUNDINGS`.
        backend: "auto" or one of `BACKENDS`.

    Returns:
        int8 [T, I] and float32 [T, 1].

    Raises:
        ValueError: a shape or dtype that does not fit; an unknown activation or rounding; a backend that cannot run
            this.
    """
    check_gated(gate_up, activation, rounding)
    width = gate_up.shape[1]
    choice = choose(gate_up.device, gate_up.shape[0], width, width // 2, gate_up.dtype, backend)
    result: tuple[torch.Tensor, torch.Tensor] = backend_module(choice.name).gated_quantize(
        gate_up, activation, rounding
    )
    return result
