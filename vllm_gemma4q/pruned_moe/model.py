"""vLLM's Gemma 4 layers, each with its own number of experts.

vLLM 0.32 builds all decoder layers from one configuration, so `num_experts` holds for all. Whatever else it needs,
from routing to loading and expert parallelism (98 experts on 4 ranks: 25, 25, 24, 24), it takes from the layer.
Not done: EPLB, which moves experts between layers' equal tables.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models import gemma4
from vllm.model_executor.models.utils import extract_layer_index

from vllm_gemma4q.architecture import EXPERTS_PER_LAYER, TextArchitecture, parse_text_architecture
from vllm_gemma4q.errors import InputError


@contextmanager
def own_experts_in_each_layer(vllm_config: VllmConfig) -> Iterator[None]:
    """Gemma 4 models built within have layers of as many experts as the configuration lists for each.

    Does nothing where it lists none. `Gemma4Model` looks its layers' class up by name while it is built, and that is
    what is replaced until then; vLLM builds models one at a time.

    Raises:
        InputError: the list does not fit the model, or is asked for together with EPLB.
    """
    config = vllm_config.model_config.hf_config
    if getattr(getattr(config, "text_config", config), EXPERTS_PER_LAYER, None) is None:
        yield
        return
    architecture = parse_text_architecture(json.loads(config.to_json_string(use_diff=False)))
    _check_engine(vllm_config, architecture)
    build = gemma4.Gemma4DecoderLayer

    def build_layer(config: Any, *args: Any, prefix: str = "", **options: Any) -> gemma4.Gemma4DecoderLayer:
        own = copy.copy(config)
        own.num_experts = architecture.layers[extract_layer_index(prefix)].num_experts
        return build(own, *args, prefix=prefix, **options)

    gemma4.Gemma4DecoderLayer = build_layer
    try:
        yield
    finally:
        gemma4.Gemma4DecoderLayer = build


def _check_engine(vllm_config: VllmConfig, architecture: TextArchitecture) -> None:
    counts = {layer.num_experts for layer in architecture.layers if layer.num_experts is not None}
    if len(counts) > 1 and vllm_config.parallel_config.enable_eplb:
        raise InputError(
            f"--enable-eplb: got layers of {min(counts)} to {max(counts)} experts, expected the same number in all: "
            "leave it off for this checkpoint"
        )
