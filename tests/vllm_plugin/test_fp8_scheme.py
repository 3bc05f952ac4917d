"""Which FP8 checkpoints are claimed, and what their lists of ignored modules mean."""

import copy
from typing import Any

import pytest
from vllm_plugin.fp8_checkpoints import compressed_tensors
from vllm_plugin.test_scheme import GEMMA4, GEMMA4_TEXT, LLAMA, QUARK_013

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.fp8_static.format import Granularity, quantization_config
from vllm_gemma4q.fp8_static.ignore import IgnoreList
from vllm_gemma4q.fp8_static.scheme import METHOD_NAME, claims, ignored_names

# As AutoFP8 0.2 writes it.
AUTO_FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "static",
    "ignored_layers": ["lm_head", "model.vision_tower.encoder.layers.0.mlp.up_proj.linear"],
    "kv_cache_scheme": None,
}
LLM_COMPRESSOR = compressed_tensors(["lm_head", "re:.*vision_tower.*"])
OURS = [quantization_config(["lm_head"], granularity) for granularity in Granularity]


@pytest.mark.parametrize("config", [AUTO_FP8, LLM_COMPRESSOR, *OURS], ids=["autofp8", "llm-compressor", "ours", "rows"])
@pytest.mark.parametrize("model", [GEMMA4, GEMMA4_TEXT], ids=["multimodal", "text"])
def test_claimed(config: dict[str, Any], model: Any) -> None:
    for user in (None, METHOD_NAME, config["quant_method"]):
        assert claims(config, user, model)
    assert not claims(config, "humming", model)


@pytest.mark.parametrize("model", [LLAMA, None], ids=["llama", "unknown"])
def test_other_models_are_left_alone(model: Any) -> None:
    assert not claims(AUTO_FP8, None, model)


GROUP = "config_groups/group_0"


@pytest.mark.parametrize(
    ("base", "path", "value"),
    [
        (AUTO_FP8, "activation_scheme", "dynamic"),
        (AUTO_FP8, "weight_block_size", [128, 128]),
        (AUTO_FP8, "store_dtype", "mxfp4"),
        (AUTO_FP8, "quant_method", "modelopt"),
        (LLM_COMPRESSOR, "format", "pack-quantized"),
        (LLM_COMPRESSOR, "config_groups", {}),
        (LLM_COMPRESSOR, "kv_cache_scheme", {"num_bits": 8}),
        (LLM_COMPRESSOR, f"{GROUP}/targets", ["re:.*mlp.*"]),
        (LLM_COMPRESSOR, f"{GROUP}/weights/num_bits", 4),
        (LLM_COMPRESSOR, f"{GROUP}/weights/type", "int"),
        (LLM_COMPRESSOR, f"{GROUP}/weights/strategy", "block"),
        (LLM_COMPRESSOR, f"{GROUP}/input_activations", None),
        (LLM_COMPRESSOR, f"{GROUP}/input_activations/dynamic", True),
        (LLM_COMPRESSOR, f"{GROUP}/input_activations/strategy", "token"),
        (LLM_COMPRESSOR, f"{GROUP}/output_activations", {"num_bits": 8}),
    ],
)
def test_other_schemes_are_left_alone(base: dict[str, Any], path: str, value: Any) -> None:
    config = copy.deepcopy(base)
    *parents, key = path.split("/")
    target: dict[str, Any] = config
    for parent in parents:
        target = target[parent]
    target[key] = value
    assert not claims(config, None, GEMMA4)


def test_quark_is_left_alone() -> None:
    assert not claims(QUARK_013, None, GEMMA4)


@pytest.mark.parametrize("key", ["ignored_layers", "modules_to_not_convert", "ignore"])
def test_the_list_has_three_names(key: str) -> None:
    assert ignored_names({key: ["a", "b"]}) == ("a", "b")
    assert ignored_names({}) == ()


UP = "model.language_model.layers.3.mlp.up_proj"
TOWER = "model.vision_tower.encoder.layers.0.mlp.up_proj.linear"


@pytest.mark.parametrize(
    ("entry", "module", "covered"),
    [
        (UP, UP, True),
        ("language_model.model.layers.3.mlp.up_proj", UP, True),
        ("model.layers.3.mlp.up_proj", UP, True),
        ("language_model.model.layers.3.mlp.gate_up_proj", UP, True),
        ("model.language_model.layers.3", UP, True),
        ("layers.3.mlp", UP, True),
        ("up_proj", UP, True),
        ("model.language_model", UP, True),
        ("layers.30", UP, False),
        ("ayers.3", UP, False),
        ("down_proj", UP, False),
        ("vision_tower", UP, False),
        ("re:.*up_proj", UP, True),
        ("re:up_proj", UP, False),
        ("re:.*layers\\.3\\..*", UP, True),
        ("*layers.3.*", UP, True),
        ("*vision_tower*", UP, False),
        (TOWER, TOWER, True),
        ("vision_tower", TOWER, True),
        ("model.vision_tower", TOWER, True),
        ("vision_tower.encoder.layers.0.mlp.up_proj", TOWER, True),
        ("re:vision_tower.*", TOWER, True),
        ("re:model.vision_tower.*", TOWER, True),
        ("embed_vision", TOWER, False),
        ("model.language_model.layers.1.experts.0.up_proj", "model.language_model.layers.1.experts", True),
        ("model.language_model.layers.1.experts.gate_up_proj", "layers.1.experts", True),
        ("experts", "model.language_model.layers.1.experts.2.up_proj", True),
        ("router", "model.language_model.layers.1.router.proj", True),
    ],
)
def test_entries(entry: str, module: str, covered: bool) -> None:
    assert IgnoreList([entry]).covers(module) is covered
    assert not IgnoreList([]).covers(module)


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r"config.json: 're:\*up' is not a regular expression"):
        IgnoreList(["re:*up"])
