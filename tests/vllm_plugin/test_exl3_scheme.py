"""Which EXL3 checkpoints are claimed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_plugin.test_scheme import GEMMA4, GEMMA4_TEXT, LLAMA, QUARK_013

from vllm_gemma4q.exl3.facts import Packed
from vllm_gemma4q.exl3.scheme import METHOD_NAME, claims

# As ExLlamaV3 writes it; old files know no codebook.
EXL3 = {
    "quant_method": "exl3",
    "version": "0.0.6",
    "bits": 3.5,
    "head_bits": 6,
    "calibration": {"rows": 100, "cols": 2048},
    "out_scales": "auto",
    "codebook": "mcg",
}


@pytest.mark.parametrize("model", [GEMMA4, GEMMA4_TEXT], ids=["multimodal", "text"])
@pytest.mark.parametrize("config", [EXL3, {"quant_method": "exl3"}], ids=["new", "bare"])
def test_claimed(config: dict[str, Any], model: Any) -> None:
    for user in (None, METHOD_NAME, "exl3"):
        assert claims(config, user, model)
    assert not claims(config, "fp8", model)


@pytest.mark.parametrize("model", [LLAMA, None], ids=["llama", "unknown"])
def test_other_models_are_left_alone(model: Any) -> None:
    assert not claims(EXL3, None, model)


@pytest.mark.parametrize("config", [QUARK_013, {"quant_method": "exl2"}, {}], ids=["quark", "exl2", "none"])
def test_other_methods_are_left_alone(config: dict[str, Any]) -> None:
    assert not claims(config, None, GEMMA4)


@pytest.mark.engine
def test_registering_twice_changes_nothing() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    from vllm_gemma4q.exl3.config import Exl3Config
    from vllm_gemma4q.plugin import register_exl3

    register_exl3()
    register_exl3()
    assert QUANTIZATION_METHODS.count(METHOD_NAME) == 1
    assert get_quantization_config(METHOD_NAME) is Exl3Config
    assert Exl3Config.override_quantization_method(EXL3, None, hf_config=GEMMA4) == METHOD_NAME
    assert Exl3Config.override_quantization_method(EXL3, None, hf_config=LLAMA) is None


def test_an_output_layer_beside_a_drafts_own() -> None:
    """vLLM's second model runner compares them, to share what is equal."""
    utils = pytest.importorskip("vllm.v1.worker.gpu.spec_decode.eagle.utils")

    from vllm_gemma4q.exl3.lm_head import Exl3LMHeadMethod

    packed = Packed(128, 256, 64, "mcg")
    layer, draft = torch.nn.Module(), torch.nn.Linear(128, 256, bias=False)
    layer.tp_rank, layer.tp_size = 0, 1  # type: ignore[assignment]
    Exl3LMHeadMethod([packed]).create_weights(layer, 128, [256], 128, 256, torch.bfloat16)
    owner = SimpleNamespace(has_own_lm_head=True)
    assert utils._should_share(owner, "has_own_lm_head", draft, layer) is False
    assert "weight" not in layer.state_dict()
