"""vLLM's Gemma 4 with one addition: tensors that quantizers lay out otherwise are mended while they stream in.

Only for checkpoints that `config.py` claimed; for all others this is the upstream class.
"""

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models import gemma4

from vllm_gemma4q.quark_int8.config import QuarkInt8Config
from vllm_gemma4q.quark_int8.mend import Weights, mend


class Gemma4ForCausalLM(gemma4.Gemma4ForCausalLM):
    """Upstream's class, under its own name; `mend.py` says what `load_weights` adds."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # A weight and its scale may arrive in different calls: the multimodal wrapper calls once per run of names.
        self._half_norms: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Weights) -> set[str]:
        if isinstance(self.quant_config, QuarkInt8Config) and self.quant_config.facts is not None:
            weights = mend(weights, self.quant_config.facts.int8_norms, self._half_norms)
        loaded: set[str] = super().load_weights(weights)
        return loaded
