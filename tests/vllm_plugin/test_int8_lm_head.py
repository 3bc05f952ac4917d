"""An output layer in INT8 holds a copy of its weights: what would change these behind its back is refused."""

from types import SimpleNamespace

import pytest
import torch
from tolerances import INT8_AGAINST_BF16, rms_error

pytestmark = pytest.mark.engine


def _asked_by(monkeypatch: pytest.MonkeyPatch, enable_sleep_mode: bool) -> None:
    from vllm_gemma4q.quark_int8 import lm_head

    engine = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=enable_sleep_mode))
    monkeypatch.setattr(lm_head, "get_current_vllm_config", lambda: engine)


def test_not_with_an_engine_that_may_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    from vllm_gemma4q.quark_int8.config import QuarkInt8Config
    from vllm_gemma4q.quark_int8.lm_head import Int8LMHeadMethod

    config, layer = QuarkInt8Config(()), object.__new__(ParallelLMHead)
    monkeypatch.setenv("GEMMA4Q_INT8_LM_HEAD", "1")
    _asked_by(monkeypatch, enable_sleep_mode=False)
    assert isinstance(config.get_quant_method(layer, "lm_head"), Int8LMHeadMethod)
    _asked_by(monkeypatch, enable_sleep_mode=True)
    with pytest.raises(ValueError, match=r"^GEMMA4Q_INT8_LM_HEAD: got 1 with --enable-sleep-mode, .*$"):
        config.get_quant_method(layer, "lm_head")
    monkeypatch.setenv("GEMMA4Q_INT8_LM_HEAD", "0")
    assert config.get_quant_method(layer, "lm_head") is None


def test_weights_are_not_loaded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come in several runs of names before the layer is quantized, and never after."""
    from vllm.model_executor.models import gemma4

    from vllm_gemma4q.model import Gemma4ForCausalLM
    from vllm_gemma4q.quark_int8.lm_head import Int8LMHeadMethod

    monkeypatch.setattr(gemma4.Gemma4ForCausalLM, "load_weights", lambda self, weights: set())
    model, head = object.__new__(Gemma4ForCausalLM), torch.nn.Linear(64, 48, bias=False).requires_grad_(False)
    method = Int8LMHeadMethod()
    head.quant_method = method  # type: ignore[assignment]
    torch.nn.Module.__init__(model)
    model.lm_head, model._mend = head, None
    assert model.load_weights([]) == model.load_weights([]) == set()
    method.process_weights_after_loading(head)  # type: ignore[arg-type]
    x = torch.randn(3, 64)
    assert rms_error(method.apply(head, x), head(x)) <= INT8_AGAINST_BF16  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"^GEMMA4Q_INT8_LM_HEAD: got weights for a model that is loaded, .*$"):
        model.load_weights([])


def test_a_layer_that_a_pooling_model_left_out() -> None:
    """vLLM moves it to the meta device, and asks every layer to get ready."""
    from vllm_gemma4q.quark_int8.lm_head import Int8LMHeadMethod

    method = Int8LMHeadMethod()
    method.process_weights_after_loading(torch.nn.Linear(64, 48, device="meta"))  # type: ignore[arg-type]
    assert method.linear is None
