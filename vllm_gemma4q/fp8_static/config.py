"""vLLM's quantization config for Gemma 4 in FP8 with static scales.

Claims a checkpoint that `scheme.py` recognises, reads its headers once in the process that builds the engine's
configuration, and answers per module from those facts. Workers receive the facts pickled. Everything that is
not claimed goes to vLLM untouched.
"""

import json
import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.platforms import current_platform

from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.compat import checkpoint_module, has_checkpoint_mapper
from vllm_gemma4q.fp8_static.facts import Facts, disagreements, read_facts
from vllm_gemma4q.fp8_static.ignore import IgnoreList
from vllm_gemma4q.fp8_static.mend import mend
from vllm_gemma4q.fp8_static.scheme import METHOD_NAME, claims, ignored_names
from vllm_gemma4q.quark_int8.headers import find_headers

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

    from vllm_gemma4q.model import Mender

# Below vLLM's own logger, which has the handler and the level that users set: others are silent below warnings.
logger = init_logger(f"vllm.{__name__}")

_NAMED = 8  # leftovers that the warning spells out


class Fp8StaticConfig(QuantizationConfig):
    """One claimed checkpoint: its list of ignored modules, and after `maybe_update_config` the facts of its headers."""

    def __init__(self, ignored: Sequence[str]) -> None:
        super().__init__()
        self.ignored = tuple(ignored)
        self.facts: Facts | None = None

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Our method's name for checkpoints in exactly this scheme, None for all others."""
        return METHOD_NAME if claims(hf_quant_cfg, user_quant, hf_config) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Fp8StaticConfig":
        return cls(ignored_names(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the checkpoint's headers and decide every module.

        Raises:
            InputError: the checkpoint cannot be served as it is; the message names the tensor (see `read_facts`).
        """
        # As written to config.json: keys are strings and per-layer sizes are spelled out.
        architecture = parse_text_architecture(json.loads(hf_config.to_json_string(use_diff=False)))
        ignored = IgnoreList(self.ignored)
        self.facts = read_facts(architecture, find_headers(model_name, revision), ignored)
        self._warn(disagreements(architecture, self.facts, ignored))
        if current_platform.is_cpu():
            logger.info(
                "FP8 on a CPU: weights stay in E4M3 and are decoded to float32 a block at a time; inputs are rounded "
                "to E4M3 with their static scales, so answers are those of FP8 hardware up to the order of sums. "
                "Much slower than BF16: for looking at a checkpoint, not for traffic."
            )

    def _warn(self, wrong: list[str]) -> None:
        assert self.facts is not None
        if wrong:
            module = wrong[0]
            stored = "FP8" if self.facts.is_fp8(module) else "unquantized"
            logger.warning(
                "config.json's list of ignored modules disagrees with the weights on %d modules, e.g. %s is %s in "
                "the file. The weights decide.",
                len(wrong),
                module,
                stored,
            )
        if leftovers := sorted(self.facts.leftovers):
            more = f" and {len(leftovers) - _NAMED} more" if len(leftovers) > _NAMED else ""
            logger.warning(
                "Dropped %d leftover scales of modules that are not quantized: %s%s.",
                len(leftovers),
                ", ".join(leftovers[:_NAMED]),
                more,
            )

    def is_fp8(self, prefix: str) -> bool:
        """Whether the linear or experts that the engine calls `prefix` are FP8. Raises InputError: there are none."""
        return self._facts().is_fp8(self._module(prefix))

    def _module(self, prefix: str) -> str:
        return checkpoint_module(prefix, self._facts().fp8, self._facts().unquantized)

    def _facts(self) -> Facts:
        if self.facts is None:
            raise RuntimeError("the checkpoint's headers were not read: maybe_update_config did not run")
        return self.facts

    def weight_mender(self) -> "Mender | None":
        """What the model streams its tensors through (see `vllm_gemma4q.model`)."""
        return partial(mend, facts=self._facts())

    def get_checkpoint_weight_mapper(self) -> "WeightsMapper":
        """vLLM's, without leftover scales: those of towers never pass through the language model's mender."""
        return self._without_leftovers(super().get_checkpoint_weight_mapper())

    def get_cache_scale_mapper(self) -> "WeightsMapper":
        """vLLM's; where it asks for no other, also without leftover scales."""
        mapper: WeightsMapper = super().get_cache_scale_mapper()
        return mapper if has_checkpoint_mapper(QuantizationConfig) else self._without_leftovers(mapper)

    def _without_leftovers(self, mapper: "WeightsMapper") -> "WeightsMapper":
        from vllm.model_executor.models.utils import WeightsMapper

        towers = [name for name in sorted(self._facts().leftovers) if ".layers." not in name or "_tower." in name]
        if not towers:
            return mapper
        pattern = re.compile("^(?:" + "|".join(map(re.escape, towers)) + ")$")
        return mapper | WeightsMapper(orig_to_new_regex={pattern: None})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """vLLM's or our method for a layer; None where vLLM's default for unquantized layers applies."""
        from vllm.model_executor.layers.attention import Attention
        from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

        if isinstance(layer, RoutedExperts):
            from vllm_gemma4q.fp8_static.moe import fp8_experts_method

            if not self.is_fp8(prefix):
                return UnquantizedFusedMoEMethod(layer.moe_config)
            return fp8_experts_method(layer, self._module(prefix) in self._facts().channel_experts)
        if isinstance(layer, LinearBase):
            from vllm_gemma4q.fp8_static.linear import fp8_linear_method

            return fp8_linear_method(self, layer, prefix) if self.is_fp8(prefix) else UnquantizedLinearMethod()
        # Scales of the KV cache, where a checkpoint has them, are vLLM's to load.
        return BaseKVCacheMethod(self) if isinstance(layer, Attention) else None

    def get_name(self) -> str:
        return METHOD_NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        from vllm_gemma4q.fp8_static.linear import engine_has_kernels

        # Our own operations compute in float32 anyway; vLLM's kernels do not take such inputs.
        wide = [] if engine_has_kernels() else [torch.float32]
        return [torch.bfloat16, torch.float16, *wide]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # as stock vLLM: before sm_89, Marlin's kernels decode the weights

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []
