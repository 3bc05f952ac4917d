"""vLLM's quantization config for Gemma 4 in Quark's W8A8 INT8.

Claims a checkpoint that `scheme.py` recognises, reads its headers once in the process that builds the engine's
configuration, and answers per module from those facts. Workers receive the facts pickled. Everything that is
not claimed goes to vLLM untouched.
"""

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.platforms import current_platform

from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.compat import checkpoint_module
from vllm_gemma4q.module_headers import relative_name
from vllm_gemma4q.quark_int8 import lm_head
from vllm_gemma4q.quark_int8.facts import Facts, disagreements, read_facts
from vllm_gemma4q.quark_int8.headers import find_headers
from vllm_gemma4q.quark_int8.mend import mend
from vllm_gemma4q.quark_int8.scheme import METHOD_NAME, claims

if TYPE_CHECKING:
    from vllm_gemma4q.model import Mender

logger = init_logger(__name__)


class QuarkInt8Config(QuantizationConfig):
    """One claimed checkpoint: its exclude list, and after `maybe_update_config` the facts of its headers."""

    def __init__(self, exclude: tuple[str, ...]) -> None:
        super().__init__()
        self.exclude = exclude
        self.facts: Facts | None = None

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Our method's name for checkpoints in exactly this scheme, None for all others."""
        return METHOD_NAME if claims(hf_quant_cfg, user_quant, hf_config) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QuarkInt8Config":
        return cls(tuple(config.get("exclude") or ()))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the checkpoint's headers and decide every module.

        Raises:
            InputError: the checkpoint cannot be served as it is; the message names the tensor (see `read_facts`).
        """
        # As written to config.json: keys are strings and per-layer sizes are spelled out.
        architecture = parse_text_architecture(json.loads(hf_config.to_json_string(use_diff=False)))
        self.facts = read_facts(architecture, find_headers(model_name, revision))
        wrong = disagreements(architecture, self.facts, self.exclude)
        if wrong:
            module = wrong[0]
            stored = "int8" if relative_name(module) in self.facts.int8 else "unquantized"
            logger.warning(
                "config.json's exclude list disagrees with the weights on %d modules, e.g. %s is %s in the file. "
                "The weights decide.",
                len(wrong),
                module,
                stored,
            )

    def is_int8(self, prefix: str) -> bool:
        """Whether the linear or experts that the engine calls `prefix` are int8. Raises InputError: there are none."""
        if self.facts is None:
            raise RuntimeError("the checkpoint's headers were not read: maybe_update_config did not run")
        return self.facts.is_int8(checkpoint_module(prefix, self.facts.int8, self.facts.unquantized))

    def weight_mender(self) -> "Mender | None":
        """What the model streams its tensors through (see `vllm_gemma4q.model`)."""
        return None if self.facts is None else partial(mend, int8_norms=self.facts.int8_norms, half_norms={})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """vLLM's or our method for a layer; None where vLLM's default for unquantized layers applies."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        if isinstance(layer, RoutedExperts):
            from vllm_gemma4q.quark_int8.moe import int8_experts_method

            return int8_experts_method(layer) if self.is_int8(prefix) else UnquantizedFusedMoEMethod(layer.moe_config)
        if isinstance(layer, LinearBase):
            from vllm_gemma4q.quark_int8.linear import int8_linear_method

            return int8_linear_method(self, layer) if self.is_int8(prefix) else UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead) and lm_head.is_wanted():
            return lm_head.int8_lm_head_method()
        return None

    def get_name(self) -> str:
        return METHOD_NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        # vLLM's int8 linears for CPUs abort the process on float16 ("scale_C: scalar path not implemented").
        return [torch.bfloat16] if current_platform.is_cpu() else [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # Turing: the first with int8 matrix instructions

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []
