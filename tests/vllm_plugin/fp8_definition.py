"""What an FP8 static checkpoint says by definition: transformers in float32 with every rounding spelled out.

Weights are code * weight_scale; inputs of quantized linears are divided by input_scale, saturated, rounded to E4M3
and multiplied back. Dense models. Independent of the kernels under test.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from vllm_plugin.checkpoints import load

E4M3 = torch.float8_e4m3fn


def logprobs(
    bf16: Path, fp8: Path, prompts: Sequence[Sequence[int]], round_inputs: bool = True
) -> tuple[np.ndarray, ...]:
    """Log-probabilities of prompts, float32 [T - 1, V] each, as `engine.Answers` has them.

    Args:
        bf16: the unquantized checkpoint.
        fp8: its quantized version.
        round_inputs: False keeps inputs as they are: what a weight-only engine computes.
    """
    import transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = transformers.Gemma4ForConditionalGeneration.from_pretrained(bf16, dtype=torch.float32).eval()
    tensors = load(fp8)
    for name, module in model.named_modules():
        if f"{name}.weight_scale" in tensors:
            module.weight.data = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
            if round_inputs:
                scale = tensors[f"{name}.input_scale"]
                module.register_forward_pre_hook(lambda _, args, scale=scale: (_rounded(args[0], scale),))
    with torch.no_grad():
        scores = [model(input_ids=torch.tensor([list(prompt)])).logits[0, :-1] for prompt in prompts]
    torch.set_num_threads(threads)
    return tuple(score.float().log_softmax(dim=-1).numpy() for score in scores)


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).clamp(-448, 448).to(E4M3).float() * scale
