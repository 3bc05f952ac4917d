"""vLLM's quantization config for Gemma 4 in EXL3.

Claims a checkpoint that `scheme.py` recognises, reads its headers once in the process that builds the engine's
configuration, and answers per module from those facts. Workers receive the facts pickled. Everything that is
not claimed goes to vLLM untouched.
"""

import importlib.util
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.platforms import current_platform

from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.compat import checkpoint_module
from vllm_gemma4q.exl3 import storage
from vllm_gemma4q.exl3.facts import LM_HEAD, Facts, read_facts
from vllm_gemma4q.exl3.mend import mend
from vllm_gemma4q.exl3.scheme import METHOD_NAME, claims
from vllm_gemma4q.quark_int8.headers import find_headers

if TYPE_CHECKING:
    from vllm_gemma4q.model import Mender

# Below vLLM's own logger, which has the handler and the level that users set: others are silent below warnings.
logger = init_logger(f"vllm.{__name__}")


class Exl3Config(QuantizationConfig):
    """One claimed checkpoint: after `maybe_update_config`, the facts of its headers."""

    def __init__(self) -> None:
        super().__init__()
        self.facts: Facts | None = None

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Our method's name for EXL3 checkpoints of Gemma 4, None for all others."""
        return METHOD_NAME if claims(hf_quant_cfg, user_quant, hf_config) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Exl3Config":
        return cls()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the checkpoint's headers and decide every linear.

        Raises:
            InputError: the checkpoint cannot be served as it is; the message names the tensor (see `read_facts`).
        """
        # As written to config.json: keys are strings and per-layer sizes are spelled out.
        architecture = parse_text_architecture(json.loads(hf_config.to_json_string(use_diff=False)))
        headers = find_headers(model_name, revision)
        self.facts = read_facts(architecture, headers)
        if wrong := storage.disagreements(storage.read_storage(model_name, revision), headers):
            logger.warning(
                "%s disagrees with the weights on %d tensors, e.g. %s. The weights decide.",
                storage.FILE,
                len(wrong),
                wrong[0],
            )
        if current_platform.is_cpu():
            logger.info(
                "EXL3 on a CPU: weights stay packed and are decoded as they are multiplied%s.",
                "" if importlib.util.find_spec("numba") else ", seven times slower than with numba: pip install numba",
            )

    def _facts(self) -> Facts:
        if self.facts is None:
            raise RuntimeError("the checkpoint's headers were not read: maybe_update_config did not run")
        return self.facts

    def weight_mender(self) -> "Mender | None":
        """What the model streams its tensors through (see `vllm_gemma4q.model`)."""
        return partial(mend, facts=self._facts())

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """vLLM's or our method for a layer; None where vLLM's default for unquantized layers applies."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from vllm_gemma4q.exl3.linear import Exl3LinearMethod
        from vllm_gemma4q.exl3.lm_head import Exl3LMHeadMethod
        from vllm_gemma4q.exl3.moe import Exl3MoEMethod

        facts = self._facts()
        if isinstance(layer, RoutedExperts | LinearBase):
            module = checkpoint_module(prefix, facts.modules, facts.unquantized)
        if isinstance(layer, RoutedExperts):
            if facts.is_packed(module):
                return Exl3MoEMethod(layer.moe_config, facts.experts(module))
            return UnquantizedFusedMoEMethod(layer.moe_config)
        if isinstance(layer, LinearBase):
            return Exl3LinearMethod(facts.shards(module)) if facts.is_packed(module) else UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead) and (head := facts.linears.get(LM_HEAD)):
            return Exl3LMHeadMethod([head])
        return None

    def get_name(self) -> str:
        return METHOD_NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # before sm_80 by torch's own operations (see the backends of `gemma4q_kernels.exl3`)

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []
