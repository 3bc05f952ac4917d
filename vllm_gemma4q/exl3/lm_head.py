"""The output layer in EXL3: files hold one of its own, though their configuration ties it to the embeddings.

So tying leaves it as it is, and the embeddings keep their unquantized weights. vLLM pads the vocabulary to multiples of
64, the format to multiples of 128: the file has rows for all of vLLM's padding, zeros.
"""

from typing import Any

import torch
from gemma4q_kernels.exl3_layout import Span

from vllm_gemma4q.exl3.facts import Packed
from vllm_gemma4q.exl3.linear import Exl3LinearMethod


class Exl3LMHeadMethod(Exl3LinearMethod):
    """A linear from hidden states to the vocabulary of this rank."""

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """With an empty `weight`: vLLM's second model runner compares that of a draft model with it, unasked."""
        super().create_weights(layer, *args, **kwargs)
        layer.register_buffer("weight", torch.empty(0), persistent=False)

    def outputs(self, packed: Packed, local: int, rank: int, ranks: int) -> Span:
        return Span(rank * local, local)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """The layer itself, untied."""
        return layer
