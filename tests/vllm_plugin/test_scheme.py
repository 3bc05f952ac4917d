"""Which checkpoints are claimed: Gemma 4 in exactly W8A8 INT8; all others stay vLLM's."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_gemma4q.quark_int8.format import quantization_config
from vllm_gemma4q.quark_int8.scheme import METHOD_NAME, claims, is_excluded

GEMMA4 = SimpleNamespace(model_type="gemma4", architectures=["Gemma4ForConditionalGeneration"])
GEMMA4_TEXT = SimpleNamespace(model_type="gemma4_text", architectures=["Gemma4ForCausalLM"])
LLAMA = SimpleNamespace(model_type="llama", architectures=["LlamaForCausalLM"])

# As amd-quark 0.13 writes it (ModelQuantizer.direct_quantize_checkpoint with Int8PerChannelSpec), shortened.
QUARK_013 = {
    "global_quant_config": {
        "input_tensors": {
            "dtype": "int8",
            "is_dynamic": True,
            "qscheme": "per_channel",
            "ch_axis": 1,
            "symmetric": True,
        },
        "output_tensors": None,
        "weight": {"dtype": "int8", "is_dynamic": False, "qscheme": "per_channel", "ch_axis": 0, "symmetric": True},
        "bias": None,
        "target_device": None,
    },
    "exclude": ["model.vision_tower.encoder.layers.0.mlp.down_proj.linear"],
    "algo_config": None,
    "softmax_quant_spec": None,
    "quant_method": "quark",
    "layer_type_quant_config": {},
    "layer_quant_config": {},
    "kv_cache_quant_config": {},
    "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
}


@pytest.mark.parametrize("config", [QUARK_013, quantization_config(["lm_head"])], ids=["quark-0.13", "ours"])
@pytest.mark.parametrize("model", [GEMMA4, GEMMA4_TEXT], ids=["multimodal", "text"])
@pytest.mark.parametrize("user", [None, "quark", METHOD_NAME])
def test_claimed(config: dict[str, Any], model: Any, user: str | None) -> None:
    assert claims(config, user, model)


def _changed(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(QUARK_013)
    *parents, key = path.split("/")
    target: dict[str, Any] = config
    for parent in parents:
        target = target[parent]
    target[key] = value
    return config


FP8_LAYER = {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_channel"}, "input_tensors": None}


@pytest.mark.parametrize(
    "path, value",
    [
        ("quant_method", "fp8"),
        ("global_quant_config", None),
        ("global_quant_config/weight/dtype", "int4"),
        ("global_quant_config/weight/qscheme", "per_tensor"),
        ("global_quant_config/weight/symmetric", False),
        ("global_quant_config/weight/ch_axis", 1),
        ("global_quant_config/weight/is_dynamic", True),
        ("global_quant_config/weight", [{"dtype": "fp8_e4m3"}, {"dtype": "int4"}]),
        ("global_quant_config/input_tensors", None),
        ("global_quant_config/input_tensors/is_dynamic", False),
        ("global_quant_config/input_tensors/qscheme", "per_tensor"),
        ("global_quant_config/input_tensors/symmetric", False),
        ("global_quant_config/output_tensors", {"dtype": "fp8_e4m3"}),
        ("layer_quant_config", {"*k_proj": FP8_LAYER}),
        ("layer_type_quant_config", {"Linear": FP8_LAYER}),
        ("kv_cache_quant_config", {"*": {}}),
        ("softmax_quant_spec", {"dtype": "fp8_e4m3"}),
        ("export/kv_cache_group", ["*k_proj"]),
        ("export/weight_format", "fake_quantized"),
    ],
)
def test_other_schemes_are_left_alone(path: str, value: Any) -> None:
    assert not claims(_changed(path, value), None, GEMMA4)


@pytest.mark.parametrize("model", [LLAMA, None], ids=["llama", "unknown"])
def test_other_models_are_left_alone(model: Any) -> None:
    assert not claims(QUARK_013, None, model)


@pytest.mark.parametrize("user", ["fp8", "compressed-tensors", "humming"])
def test_another_method_asked_for_is_left_alone(user: str) -> None:
    assert not claims(QUARK_013, user, GEMMA4)


def test_a_layer_in_the_same_scheme_is_claimed() -> None:
    assert claims(_changed("layer_quant_config", {"*q_proj": QUARK_013["global_quant_config"]}), None, GEMMA4)


def test_a_specification_in_a_list_of_one_is_claimed() -> None:
    weight = QUARK_013["global_quant_config"]["weight"]
    assert claims(_changed("global_quant_config/weight", [weight]), None, GEMMA4)


@pytest.mark.parametrize(
    "rule, excluded",
    [
        ("model.language_model.layers.3.mlp.up_proj", True),
        ("model.language_model.layers.3.mlp", False),
        ("*layers.3.*", True),
        ("re:.*up_proj", True),
        ("re:up_proj", False),
        ("*vision_tower*", False),
    ],
)
def test_exclude_rules(rule: str, excluded: bool) -> None:
    assert is_excluded(["model.language_model.layers.3.mlp.up_proj"], [rule]) is excluded
