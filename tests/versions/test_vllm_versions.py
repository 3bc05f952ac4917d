"""Which vLLM the plugin warns of, and that no version's names for modules lead to garbage."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_gemma4q import compat
from vllm_gemma4q.compat import checkpoint_module
from vllm_gemma4q.errors import InputError

INT8 = frozenset({"layers.0.experts", "layers.0.self_attn.q_proj"})
FLOAT = frozenset({"layers.0.mlp.down_proj"})
# As vLLM's processes do: each loads the plugin, which tells its version each time a method is registered.
THREE_PROCESSES = """
import subprocess, sys
from vllm_gemma4q.compat import warn_if_untested
for _ in range(4):
    warn_if_untested()
if len(sys.argv) < 3:
    subprocess.run([sys.executable, "-c", sys.argv[1], *sys.argv[1:], "child"], check=True)
"""


def record(version: str, folder: Path) -> None:
    """A distribution `vllm` of that version, to be found before the real one."""
    path = folder / f"vllm-{version}.dist-info"
    path.mkdir()
    (path / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("0.34.1+cpu", "vLLM 0.34.1+cpu is newer than those it was tested with (0.29 to 0.32): trying"),
        ("1.0.0rc1", "vLLM 1.0.0rc1 is newer than those it was tested with (0.29 to 0.32): trying"),
        ("0.28.0+cpu", "vLLM 0.28.0+cpu is older than those it was tested with (0.29 to 0.32), and is not expected"),
        ("0.29.0+cpu", None),
        ("0.32.7", None),
        ("dev", None),
    ],
)
def test_an_untested_version_is_told_once(version: str, told: str | None, tmp_path: Path) -> None:
    record(version, tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GEMMA4Q_")}
    command = [sys.executable, "-c", THREE_PROCESSES, THREE_PROCESSES]
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stderr.count("tested with") == (told is not None)
    assert told is None or told in done.stderr


@pytest.mark.slow
@pytest.mark.engine
def test_a_newer_version_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The entry points of pyproject.toml, in vLLM's own registries."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.model_executor.models import ModelRegistry

    from vllm_gemma4q import plugin

    record("0.99.0", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(compat._TOLD, "")  # restored afterwards
    importlib.invalidate_caches()
    for register in (plugin.register_quark_int8, plugin.register_fp8_static, plugin.register_exl3):
        register()
    assert sum("vLLM 0.99.0 is newer" in message for message in caplog.messages) == 1
    assert {"gemma4q_quark_int8", "gemma4q_fp8_static", "gemma4q_exl3"} <= set(QUANTIZATION_METHODS)
    assert ModelRegistry.models["Gemma4ForCausalLM"].module_name == "vllm_gemma4q.model"


@pytest.mark.parametrize(
    ("engines", "ours"),
    [
        ("language_model.model.layers.0.experts", "layers.0.experts"),
        ("language_model.model.layers.0.moe.experts", "layers.0.experts"),  # vLLM to 0.30
        ("model.layers.0.self_attn.qkv_proj", "layers.0.self_attn.qkv_proj"),
        ("model.layers.0.mlp.down_proj", "layers.0.mlp.down_proj"),
        ("model.layers.0.router.proj", "model.layers.0.router.proj"),
        ("vision_tower.encoder.layers.0.mlp.up_proj", "vision_tower.encoder.layers.0.mlp.up_proj"),
    ],
)
def test_modules_have_the_names_of_the_checkpoint(engines: str, ours: str) -> None:
    assert checkpoint_module(engines, INT8, FLOAT) == ours


@pytest.mark.parametrize("name", ["layers.0.mixture.experts", "layers.0.attention.qkv_proj", "layers.1.experts"])
def test_a_module_that_the_checkpoint_does_not_know_is_refused(name: str) -> None:
    """Taken for unquantized, its int8 weights would be served as they are."""
    with pytest.raises(InputError, match=rf"module model\.{name}: vLLM .* has it, the checkpoint does not"):
        checkpoint_module(f"model.{name}", INT8, FLOAT)


def test_conflicting_pins_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another engine asks for wins over the locked versions; the rest stays as it is."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "environment"))
    script = importlib.import_module("engine_version")
    pins = ["# made by", "transformers==5.19.0", "tokenizers==0.23.3", "huggingface-hub==2.4.0", "numba==0.65.0"]
    asked = ["transformers<5.18", "numba==0.65.0; platform_machine != 's390x'", "zentorch==2; extra == 'zen'"]
    assert script.pins_without_conflicts(pins, asked) == ["numba==0.65.0"]
    assert script.pins_without_conflicts(pins, ["transformers>=5.10"]) == pins[1:]
