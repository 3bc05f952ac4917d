"""`stock.py` against vLLM's own functions: what each method makes of each entry, for every module of the real sizes."""

from types import SimpleNamespace

import pytest
from synthetic import CONFIG_26B_A4B, CONFIG_31B, shapes, small_config

from vllm_gemma4q.architecture import EXPERT_SHARDS, FUSED_SHARDS, parse_text_architecture
from vllm_gemma4q.doctor.stock import (
    DEPRECATED_METHODS,
    QUANTIZATION_METHODS,
    Decision,
    StockList,
    engine_name,
    method_of,
    modules,
)

MAPPING = {name: list(shards) for name, shards in FUSED_SHARDS.items()}
LAYERS = "model.language_model.layers."
LISTS = {
    "empty": [],
    "exact": [f"{LAYERS}0.self_attn.o_proj", f"{LAYERS}1.mlp.down_proj", "lm_head", "model.embed_vision"],
    "fused": [f"{LAYERS}0.self_attn.qkv_proj", f"{LAYERS}1.mlp.gate_up_proj"],
    "shards": [f"{LAYERS}0.self_attn.{name}_proj" for name in "qkv"],
    "absent values": [f"{LAYERS}5.self_attn.{name}_proj" for name in "qk"],
    "one shard": [f"{LAYERS}1.mlp.up_proj"],
    "globs": ["*vision_tower*", f"{LAYERS}0.*", "*"],
    "parts": ["vision_tower", "self_attn", f"{LAYERS}3"],
    "patterns": ["re:.*self_attn.*", "re:.*vision.*", r"re:language_model\.model\.layers\.1\.mlp\.(gate|up)_proj"],
    "shard patterns": ["re:.*[qk]_proj"],
    "engine names": ["language_model.model.layers.2.self_attn.qkv_proj", "language_model.model.layers.2.mlp.down_proj"],
    "experts": [f"{LAYERS}0.experts"],
    "one expert": [f"{LAYERS}0.experts.0.gate_proj", f"{LAYERS}0.experts.0.up_proj"],
    "three linears": [f"{LAYERS}1.experts.0.{shard}" for shard in EXPERT_SHARDS],
    "a tower's linear": ["model.vision_tower.encoder.layers.0.self_attn.q_proj.linear"],
}


def real_decision(method, entries, module):
    """By vLLM's functions, with names mapped by its own mapper."""
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer as compressed
    from vllm.model_executor.layers.quantization.quark.utils import should_ignore_layer as quark
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    try:
        if method == "fp8":
            ignored = is_layer_skipped(module.name, entries, MAPPING)
        elif method == "quark":
            ignored = quark(module.name, entries, MAPPING, check_children=module.is_experts)
        elif module.is_experts:
            each = {compressed(f"{module.name}.0.{shard}", entries, MAPPING) for shard in EXPERT_SHARDS}
            if len(each) == 2:
                return Decision.MIXED
            ignored = each.pop()
        else:
            ignored = compressed(module.name, entries, MAPPING)
    except ValueError:
        return Decision.MIXED
    return Decision.IGNORED if ignored else Decision.QUANTIZED


def mapped(method, entries, mapper):
    """As each method's config applies vLLM's mapper to its list."""
    if method == "fp8":
        from vllm.model_executor.layers.quantization.fp8 import Fp8Config as Config

        config = Config(is_checkpoint_fp8_serialized=True, ignored_layers=list(entries))
        config.apply_vllm_mapper(mapper)
        return config.ignored_layers
    if method == "quark":
        from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig

        config = QuarkConfig({"exclude": list(entries)})
        config.apply_vllm_mapper(mapper)
        return config.quant_config["exclude"]
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    config = SimpleNamespace(ignore=list(entries), target_scheme_map={}, kv_cache_scheme=None)
    CompressedTensorsConfig.apply_vllm_mapper(config, mapper)
    return config.ignore


@pytest.fixture(scope="module")
def mapper():
    from vllm.model_executor.models.gemma4_mm import Gemma4ForConditionalGeneration

    return Gemma4ForConditionalGeneration.hf_to_vllm_mapper.get_rename_mapper()


@pytest.mark.parametrize("method", ["quark", "fp8", "compressed-tensors"])
@pytest.mark.parametrize("entries", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("config", [CONFIG_31B, CONFIG_26B_A4B, small_config(moe=True)], ids=["31B", "26B", "small"])
def test_decisions_are_vllms(method, entries, config, mapper):
    config = {**config, "quantization_config": {"quant_method": method}}
    stock, theirs = StockList(method, entries, is_multimodal=True), mapped(method, entries, mapper)
    assert stock.entries == theirs
    found = list(modules(parse_text_architecture(config), config, list(shapes(config))))
    assert len({module.name for module in found}) == len(found)
    wrong = [(one.name, stock.decide(one)) for one in found if stock.decide(one) != real_decision(method, theirs, one)]
    assert not wrong


def test_every_kind_of_decision_occurs():
    config = {**CONFIG_26B_A4B, "quantization_config": {"quant_method": "quark"}}
    architecture = parse_text_architecture(config)
    decisions = {
        StockList("quark", entries, True).decide(module)
        for entries in LISTS.values()
        for module in modules(architecture, config, [])
    }
    assert decisions == set(Decision)


def test_text_only_names():
    assert engine_name("model.language_model.layers.0.mlp.down_proj", False) == "model.layers.0.mlp.down_proj"
    assert engine_name("model.layers.0.mlp.down_proj", False) == "model.layers.0.mlp.down_proj"


def test_methods_are_vllms():
    from typing import get_args

    import vllm
    from vllm.model_executor.layers.quantization import DEPRECATED_QUANTIZATION_METHODS, QuantizationMethods

    if not vllm.__version__.startswith("0.32."):
        pytest.skip(f"the list is vLLM 0.32's, this is {vllm.__version__}")
    assert set(get_args(QuantizationMethods)) == QUANTIZATION_METHODS  # without what plugins have added
    assert set(DEPRECATED_QUANTIZATION_METHODS) == DEPRECATED_METHODS


def test_names_of_methods_are_read_as_vllm_reads_them():
    from vllm.model_executor.layers.quantization.inc import INCConfig

    assert INCConfig.override_quantization_method({"quant_method": "auto-round"}, None) == "inc"
    assert method_of({"quant_method": "auto-round"}) == "inc"
    assert method_of({"quant_method": "compressed_tensors"}) == "compressed-tensors"
    assert method_of({"quant_method": "FP8"}) == "fp8"
    assert method_of({}) == "" and method_of({"quant_method": ["fp8"]}) is None
