"""A Gemma 4 language model of which one part at a time is in memory: transformers' own modules, loaded one by one.

Everything that computes is transformers': decoder layer (but its experts, see `experts`), rotary embeddings, masks,
norm, scaled embedding. Samples run one by one, without padding and without a cache.
Not done: shared keys and values, per-layer inputs (E2B, E4B): refused.
"""

import copy
from collections import UserDict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4RMSNorm,
    Gemma4TextDecoderLayer,
    Gemma4TextRotaryEmbedding,
    Gemma4TextScaledWordEmbedding,
)

from vllm_gemma4q.architecture import SLIDING_ATTENTION, parse_text_architecture
from vllm_gemma4q.calibration.experts import Experts
from vllm_gemma4q.calibration.weights import dtype_of, gather_rows, load_module, read_rows
from vllm_gemma4q.checkpoint import Checkpoint
from vllm_gemma4q.conformance import check_unquantized
from vllm_gemma4q.errors import InputError


class Decoder:
    """The language model of a checkpoint.

    Args:
        checkpoint: BF16, F16 or F32; experts fused or one by one.
        dtype: to compute in; None for that of the weights.
        device: to compute on.

    Raises:
        InputError: not a Gemma 4, incomplete, quantized, or with a trait that is not supported.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: str = "cpu"):
        self.architecture = parse_text_architecture(checkpoint.config)
        if self.architecture.per_layer_input_size:
            raise InputError("config.json: hidden_size_per_layer_input: models with per-layer inputs are not supported")
        if not all(layer.has_key_value for layer in self.architecture.layers):
            raise InputError("config.json: num_kv_shared_layers: models with shared keys and values are not supported")
        check_unquantized(self.architecture, checkpoint.tensors)
        self.checkpoint = checkpoint
        self.dtype = dtype or dtype_of(checkpoint)
        self.device = torch.device(device)
        self.config = _text_config(checkpoint)
        self.rotary = Gemma4TextRotaryEmbedding(self.config, device=self.device)
        self.table = checkpoint.tensors[f"{self.architecture.root}embed_tokens.weight"]
        self._head = self.table if self.is_tied else checkpoint.tensors["lm_head.weight"]

    @property
    def n_layers(self) -> int:
        return len(self.architecture.layers)

    def layer_name(self, index: int) -> str:
        """The module of one layer, as checkpoints name it."""
        return f"{self.architecture.root}layers.{index}"

    def layer(self, index: int) -> Any:
        """Load one decoder layer. The caller drops it before asking for the next."""
        config = copy.copy(self.config)
        config.num_experts = self.architecture.layers[index].num_experts
        with torch.device("meta"):
            layer = Gemma4TextDecoderLayer(config, index)
            if config.enable_moe_block:
                layer.experts = Experts(config)
        load_module(layer, self.checkpoint, self.layer_name(index) + ".", self.dtype, self.device)
        return layer.eval()

    def run(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """One sample through one layer: [T, hidden] to [T, hidden]."""
        hidden = hidden[None]
        positions = torch.arange(hidden.shape[1], device=self.device)[None]
        kind = self.config.layer_types[layer.layer_idx]
        create_mask = create_sliding_window_causal_mask if kind == SLIDING_ATTENTION else create_causal_mask
        mask = create_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        result: torch.Tensor = layer(
            hidden,
            None,
            shared_kv_states=UserDict(),
            position_embeddings=self.rotary(hidden, positions, kind),
            attention_mask=mask,
            position_ids=positions,
        )
        return result[0]

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """One sample's scaled embeddings, [T, hidden]; only the rows that it needs are read."""
        tokens, index = torch.unique(torch.tensor(list(ids)), return_inverse=True)
        if not 0 <= int(tokens[0]) <= int(tokens[-1]) < self.architecture.vocab_size:
            raise InputError(f"tokenizer: token {int(tokens[-1])}, expected less than {self.architecture.vocab_size}")
        result: torch.Tensor = self.embedding(self.token_rows(tokens.tolist()))(index.to(self.device))
        return result

    def embedding(self, weight: torch.Tensor) -> Any:
        """The scaled embedding of which `weight` [n, hidden] is all that is there."""
        n, hidden = weight.shape
        embedding = Gemma4TextScaledWordEmbedding(n, hidden, padding_idx=None, embed_scale=hidden**0.5)
        embedding.weight = torch.nn.Parameter(weight, requires_grad=False)
        return embedding.to(self.device)

    def token_rows(self, tokens: Sequence[int]) -> torch.Tensor:
        """Single rows of the embeddings, [len(tokens), hidden]."""
        return gather_rows(self.table, tokens).to(device=self.device, dtype=self.dtype)

    def norm(self) -> Any:
        """The final norm."""
        with torch.device("meta"):
            norm = Gemma4RMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        load_module(norm, self.checkpoint, f"{self.architecture.root}norm.", self.dtype, self.device)
        return norm.eval()

    @property
    def is_tied(self) -> bool:
        """Whether the output layer is the embeddings."""
        return self.architecture.tie_word_embeddings

    def head(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the output layer, [stop - start, hidden]: those of the embedding where the two are tied."""
        return read_rows(self._head, start, stop).to(device=self.device, dtype=self.dtype)


def _text_config(checkpoint: Checkpoint) -> Any:
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False).get_text_config()
    except Exception as error:  # transformers raises whatever it meets
        raise InputError(f"config.json: transformers cannot read it: {str(error).splitlines()[0]}") from error
    config._attn_implementation = "sdpa"
    return config
