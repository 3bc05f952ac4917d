"""A quantized Gemma 4 that drafts for another model: vLLM puts `draft_model.` before its modules' names."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_plugin import test_exl3_facts, test_facts, test_fp8_facts

pytestmark = pytest.mark.engine

LINEARS = ("layers.0.self_attn.qkv_proj", "layers.0.mlp.down_proj", "layers.0.router.proj")
ROOTS = ("model.", "language_model.model.")


def _int8() -> Any:
    from vllm_gemma4q.quark_int8.config import QuarkInt8Config

    config = QuarkInt8Config(())
    config.facts = test_facts.facts(test_facts.MOE, test_facts.int8_headers(test_facts.MOE))
    return config


def _fp8() -> Any:
    from vllm_gemma4q.fp8_static.config import Fp8StaticConfig

    config = Fp8StaticConfig(())
    config.facts = test_fp8_facts.facts(test_fp8_facts.MOE, test_fp8_facts.fp8_headers(test_fp8_facts.MOE))
    return config


def _exl3() -> Any:
    from vllm_gemma4q.exl3.config import Exl3Config

    config = Exl3Config()
    config.facts = test_exl3_facts.facts(test_exl3_facts.MOE, test_exl3_facts.headers_of(test_exl3_facts.MOE))
    return config


def _method(config: Any, layer_class: type, prefix: str) -> type:
    """The class of what a layer is served by, decided by its name and class alone."""
    layer = object.__new__(layer_class)
    activation = SimpleNamespace(value="gelu_tanh")
    layer.moe_config = SimpleNamespace(  # type: ignore[attr-defined]
        activation=activation, has_bias=False, is_lora_enabled=False, moe_backend="auto"
    )
    return type(config.get_quant_method(layer, prefix))


@pytest.mark.parametrize("make", [_int8, _fp8, _exl3], ids=["int8", "fp8", "exl3"])
@pytest.mark.parametrize("root", ROOTS)
def test_modules_have_the_methods_of_a_served_model(make: Callable[[], Any], root: str) -> None:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    config = make()
    modules = [*((LinearBase, linear) for linear in LINEARS), (RoutedExperts, "layers.1.experts")]
    served = [_method(config, layer_class, root + module) for layer_class, module in modules]
    drafting = [_method(config, layer_class, f"draft_model.{root}{module}") for layer_class, module in modules]
    assert drafting == served
    assert [method is UnquantizedLinearMethod for method in served] == [False, False, True, False]


@pytest.mark.parametrize("root", ROOTS)
def test_a_module_that_the_checkpoint_does_not_know_is_refused(root: str) -> None:
    from vllm_gemma4q.errors import InputError

    with pytest.raises(InputError, match=r"module draft_model\..*layers\.9\.mlp\.down_proj: vLLM .* has it"):
        _int8().is_int8(f"draft_model.{root}layers.9.mlp.down_proj")
