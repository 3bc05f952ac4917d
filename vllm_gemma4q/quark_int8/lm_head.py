"""The output layer in INT8, on demand: `GEMMA4Q_INT8_LM_HEAD=1` when serving a Quark INT8 checkpoint.

Checkpoints keep it in BF16. Of the 26B-A4B's INT8 decoding, reading it is a third. Here it is quantized when it has
been loaded, like every other linear: a scale a row, activations a token. Where it is tied to the embeddings those stay
as they are, and the quantized copy takes half their size beside them. Logits come out in the activations' dtype.

Divergence grows by what rounding this one matrix costs: see the tests. Not done: LoRA on the output layer. Weights that
change later are refused: vLLM knows nothing of the quantized copy, which would stay that of the old ones.
"""

import os
from collections.abc import Callable

import torch
from gemma4q_kernels.int8_scaled_mm import pack_linear, quantize_per_channel
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

VARIABLE = "GEMMA4Q_INT8_LM_HEAD"
_ON, _OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def is_wanted() -> bool:
    """Whether the environment asks for it.

    Raises:
        ValueError: the variable says neither yes nor no.
    """
    value = os.environ.get(VARIABLE, "").lower()
    if value not in (*_ON, *_OFF):
        raise ValueError(f"{VARIABLE}: got {value!r}, expected 1 or 0")
    return value in _ON


def int8_lm_head_method() -> "Int8LMHeadMethod":
    """The method for the output layer of the model that is being built.

    Raises:
        ValueError: the engine may throw its weights away and load them again.
    """
    if get_current_vllm_config().model_config.enable_sleep_mode:
        raise ValueError(
            f"{VARIABLE}: got 1 with --enable-sleep-mode, expected one of the two: "
            "the output layer in INT8 does not follow weights that are loaded again"
        )
    return Int8LMHeadMethod()


def refuse_reload(layer: torch.nn.Module) -> None:
    """Raises RuntimeError where a model's output layer is quantized already, by this module."""
    method = getattr(layer, "quant_method", None)
    if isinstance(method, Int8LMHeadMethod) and method.linear is not None:
        raise RuntimeError(
            f"{VARIABLE}: got weights for a model that is loaded, expected none: the output layer in INT8 does not "
            "follow them; unset the variable"
        )


class Int8LMHeadMethod(UnquantizedEmbeddingMethod):
    """Loads like the unquantized layer, [vocabulary of this rank, hidden], and multiplies in INT8."""

    linear: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor] | None = None

    def process_weights_after_loading(self, layer: ParallelLMHead) -> None:
        weight = layer.weight.data
        if weight.is_meta:  # a pooling model, which has no use for it
            return
        self.linear = pack_linear(*quantize_per_channel(weight), out_dtype=weight.dtype, rows=1).linear

    def apply(self, layer: ParallelLMHead, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[T, hidden] -> [T, vocabulary of this rank]."""
        assert self.linear is not None
        return self.linear(x, bias)
