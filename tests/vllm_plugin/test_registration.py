"""The plugin in vLLM: imported without an engine, registered any number of times, out of everybody else's way."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_plugin import checkpoints
from vllm_plugin.conftest import Family
from vllm_plugin.engine import engine_environment
from vllm_plugin.test_scheme import GEMMA4, LLAMA, QUARK_013

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.quark_int8.scheme import METHOD_NAME

IMPORTS_NO_ENGINE = """
import sys
import vllm_gemma4q.plugin, vllm_gemma4q.quark_int8, vllm_gemma4q.quark_int8.scheme, vllm_gemma4q.fp8_static.scheme
found = sorted({"vllm", "torch", "transformers", "triton"} & set(sys.modules))
assert not found, found
"""


def test_importing_imports_no_engine() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS_NO_ENGINE], check=True)


@pytest.mark.engine
def test_registering_twice_changes_nothing() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
    from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
    from vllm.model_executor.models import ModelRegistry

    from vllm_gemma4q.plugin import register_quark_int8
    from vllm_gemma4q.quark_int8.config import QuarkInt8Config

    register_quark_int8()
    model = ModelRegistry.models["Gemma4ForCausalLM"]
    register_quark_int8()
    assert QUANTIZATION_METHODS.count(METHOD_NAME) == 1
    assert get_quantization_config(METHOD_NAME) is QuarkInt8Config
    assert get_quantization_config("quark") is QuarkConfig
    assert ModelRegistry.models["Gemma4ForCausalLM"] is model
    assert model.load_model_cls().__module__ == "vllm_gemma4q.model"


@pytest.mark.engine
def test_another_plugins_model_is_left_in_place(caplog: pytest.LogCaptureFixture) -> None:
    from vllm.model_executor.models import ModelRegistry

    from vllm_gemma4q.plugin import register_quark_int8

    before = ModelRegistry.models["Gemma4ForCausalLM"]
    try:
        ModelRegistry.register_model("Gemma4ForCausalLM", "somebody.elses:Gemma4ForCausalLM")
        register_quark_int8()
        assert ModelRegistry.models["Gemma4ForCausalLM"].module_name == "somebody.elses"
    finally:
        ModelRegistry.models["Gemma4ForCausalLM"] = before
    assert "provided by somebody.elses, which is left in place" in caplog.text


@pytest.mark.engine
def test_override_answers_for_its_own_only() -> None:
    from vllm_gemma4q.quark_int8.config import QuarkInt8Config

    answer = QuarkInt8Config.override_quantization_method
    assert answer(QUARK_013, None, hf_config=GEMMA4) == METHOD_NAME
    assert answer(QUARK_013, None, hf_config=LLAMA) is None
    assert answer(QUARK_013, None) is None
    assert answer({"quant_method": "fp8"}, None, hf_config=GEMMA4) is None


def _engine_config(folder: Path, **engine: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(folder), enforce_eager=True, max_model_len=256, **engine).create_engine_config()


@pytest.fixture
def small_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in engine_environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.engine
@pytest.mark.usefixtures("small_engine")
def test_claimed_without_flags_and_picklable(moe: Family) -> None:
    from vllm_gemma4q.quark_int8.config import QuarkInt8Config

    config = _engine_config(moe.variants["int8"]).quant_config
    assert isinstance(config, QuarkInt8Config) and config.facts is not None
    copy = pickle.loads(pickle.dumps(config))
    assert copy.is_int8("language_model.model.layers.2.self_attn.qkv_proj")
    assert copy.facts == config.facts


@pytest.mark.engine
@pytest.mark.usefixtures("small_engine")
def test_bf16_is_not_claimed(moe: Family) -> None:
    assert _engine_config(moe.bf16).quant_config is None


@pytest.mark.engine
@pytest.mark.usefixtures("small_engine")
def test_float16_is_refused_on_a_cpu(moe: Family) -> None:
    """It would abort the process in vLLM's linear."""
    with pytest.raises(ValueError, match=r"torch.float16 is not supported for quantization method gemma4q_quark_int8"):
        _engine_config(moe.variants["int8"], dtype="float16")


@pytest.mark.engine
@pytest.mark.usefixtures("small_engine")
def test_a_missing_scale_is_refused(dense: Family, tmp_path: Path) -> None:
    broken, name = _without_a_scale(dense, tmp_path)
    with pytest.raises(InputError, match=f"tensor {name}: got nothing"):
        _engine_config(broken)


@pytest.mark.engine
def test_vllm_serve_shows_the_refusal(dense: Family, tmp_path: Path) -> None:
    broken, name = _without_a_scale(dense, tmp_path)
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(broken), "--max-model-len", "256"]
    done = subprocess.run(
        command, env=engine_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    last_line = done.stderr.rstrip().rpartition("\n")[2]
    assert f".errors.InputError: tensor {name}: got nothing (missing), expected BF16" in last_line


def _without_a_scale(family: Family, folder: Path) -> tuple[Path, str]:
    name = f"{checkpoints.ROOT}1.mlp.up_proj.weight_scale"

    def drop(tensors: checkpoints.Tensors) -> checkpoints.Tensors:
        return {other: tensor for other, tensor in tensors.items() if other != name}

    return checkpoints.edit(family.variants["int8"], folder / "broken", drop), name


@pytest.mark.engine
def test_both_methods_share_one_model() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm.model_executor.models import ModelRegistry

    from vllm_gemma4q.fp8_static.config import Fp8StaticConfig
    from vllm_gemma4q.fp8_static.scheme import METHOD_NAME as FP8_METHOD
    from vllm_gemma4q.model import MendingConfig
    from vllm_gemma4q.plugin import register_fp8_static, register_quark_int8

    register_quark_int8()
    model = ModelRegistry.models["Gemma4ForCausalLM"]
    register_fp8_static()
    register_fp8_static()
    assert ModelRegistry.models["Gemma4ForCausalLM"] is model
    assert QUANTIZATION_METHODS.count(FP8_METHOD) == 1
    assert get_quantization_config(FP8_METHOD) is Fp8StaticConfig
    assert get_quantization_config("fp8") is Fp8Config
    assert isinstance(Fp8StaticConfig([]), MendingConfig)
    assert not isinstance(Fp8Config(activation_scheme="static"), MendingConfig)


@pytest.mark.engine
def test_overrides_do_not_compete() -> None:
    """Each answers for its own checkpoints, and the built-in method for dynamic FP8."""
    from vllm_gemma4q.fp8_static.config import Fp8StaticConfig
    from vllm_gemma4q.fp8_static.scheme import METHOD_NAME as FP8_METHOD
    from vllm_gemma4q.quark_int8.config import QuarkInt8Config

    static, dynamic = ({"quant_method": "fp8", "activation_scheme": scheme} for scheme in ("static", "dynamic"))
    answers = {
        config: [config.override_quantization_method(found, None, hf_config=GEMMA4) for found in (static, dynamic)]
        + [config.override_quantization_method(QUARK_013, None, hf_config=GEMMA4)]
        for config in (Fp8StaticConfig, QuarkInt8Config)
    }
    assert answers == {Fp8StaticConfig: [FP8_METHOD, None, None], QuarkInt8Config: [None, None, METHOD_NAME]}
