"""Recognise EXL3 from a `quantization_config` alone. Nothing here needs vLLM or torch.

`quant_method` says it all: bits and codebooks differ from tensor to tensor, and headers know them (`facts.py`).
"""

from collections.abc import Mapping
from typing import Any

from vllm_gemma4q.quark_int8.scheme import is_gemma4

METHOD = "exl3"
METHOD_NAME = "gemma4q_exl3"


def claims(quantization_config: Mapping[str, Any], user_method: str | None, model_config: Any) -> bool:
    """Whether a checkpoint is a Gemma 4 in EXL3, and nobody asked for another method.

    Args:
        quantization_config: the entry of `config.json`.
        user_method: the engine's `--quantization`, None where not given.
        model_config: the checkpoint's transformers configuration, None where unknown.
    """
    if user_method not in (None, METHOD, METHOD_NAME):
        return False
    return quantization_config.get("quant_method") == METHOD and is_gemma4(model_config)
