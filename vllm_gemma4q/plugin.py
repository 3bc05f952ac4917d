"""vLLM entry points, group `vllm.general_plugins`: one function a method, so `VLLM_PLUGINS` selects by name.

Importing this module imports no engine. vLLM calls each function in every process, possibly more than once.
"""

import logging

_ARCHITECTURE = "Gemma4ForCausalLM"
_UPSTREAM_MODULE = "vllm.model_executor.models.gemma4"
_MODEL_MODULE = "vllm_gemma4q.quark_int8.model"

logger = logging.getLogger(__name__)


def register_quark_int8() -> None:
    """Register the quantization config for Quark W8A8 INT8 checkpoints, and the model that mends their tensors."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.models import ModelRegistry

    from vllm_gemma4q.quark_int8.config import QuarkInt8Config
    from vllm_gemma4q.quark_int8.scheme import METHOD_NAME

    register_quantization_config(METHOD_NAME)(QuarkInt8Config)
    registered = getattr(ModelRegistry.models.get(_ARCHITECTURE), "module_name", None)
    if registered == _UPSTREAM_MODULE:
        # A string: the class itself would pull in the model's modules in every process.
        ModelRegistry.register_model(_ARCHITECTURE, f"{_MODEL_MODULE}:{_ARCHITECTURE}")
    elif registered != _MODEL_MODULE:
        logger.warning(
            "%s is provided by %s, which is left in place: checkpoints with fused int8 experts or int8 norms "
            "will not load",
            _ARCHITECTURE,
            registered,
        )
