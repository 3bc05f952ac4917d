"""vLLM entry points, group `vllm.general_plugins`: one function a method, so `VLLM_PLUGINS` selects by name.

Importing this module imports no engine. vLLM calls each function in every process, possibly more than once.
"""

import logging

from vllm_gemma4q.compat import warn_if_untested

_ARCHITECTURE = "Gemma4ForCausalLM"
_UPSTREAM_MODULE = "vllm.model_executor.models.gemma4"
_MODEL_MODULE = "vllm_gemma4q.model"

logger = logging.getLogger(__name__)


def register_quark_int8() -> None:
    """Register the quantization config for Quark W8A8 INT8 checkpoints, and the model that mends their tensors."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_gemma4q.quark_int8.config import QuarkInt8Config
    from vllm_gemma4q.quark_int8.scheme import METHOD_NAME

    register_quantization_config(METHOD_NAME)(QuarkInt8Config)
    _register_model("checkpoints with fused int8 experts or int8 norms")


def register_fp8_static() -> None:
    """Register the quantization config for FP8 checkpoints with static scales, and the model that mends theirs."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_gemma4q.fp8_static.config import Fp8StaticConfig
    from vllm_gemma4q.fp8_static.scheme import METHOD_NAME

    register_quantization_config(METHOD_NAME)(Fp8StaticConfig)
    _register_model("FP8 checkpoints with static scales")


def register_exl3() -> None:
    """Register the quantization config for EXL3 checkpoints, and the model that unpacks their signs."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_gemma4q.exl3.config import Exl3Config
    from vllm_gemma4q.exl3.scheme import METHOD_NAME

    register_quantization_config(METHOD_NAME)(Exl3Config)
    _register_model("EXL3 checkpoints")


def register_pruned_moe() -> None:
    """Register the model that gives each layer its own number of experts, whatever the checkpoint's dtype."""
    _register_model("checkpoints whose layers have different numbers of experts")


def _register_model(needed_by: str) -> None:
    """Put our model, one for all methods, in the place of vLLM's; another plugin's is left there."""
    warn_if_untested()
    from vllm.model_executor.models import ModelRegistry

    registered = getattr(ModelRegistry.models.get(_ARCHITECTURE), "module_name", None)
    if registered == _UPSTREAM_MODULE:
        # A string: the class itself would pull in the model's modules in every process.
        ModelRegistry.register_model(_ARCHITECTURE, f"{_MODEL_MODULE}:{_ARCHITECTURE}")
    elif registered != _MODEL_MODULE:
        logger.warning(
            "%s is provided by %s, which is left in place: %s will not load", _ARCHITECTURE, registered, needed_by
        )
