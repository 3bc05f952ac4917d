"""Headers of checkpoints whose layers have different numbers of experts: each layer is held to its own."""

import re
from typing import Any

import pytest
import torch
from synthetic import small_config, write_checkpoint
from vllm_plugin.test_facts import Header, int8_headers
from vllm_plugin.test_facts import facts as int8_facts
from vllm_plugin.test_fp8_facts import facts as fp8_facts
from vllm_plugin.test_fp8_facts import fp8_headers

from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.conformance import check_unquantized
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.fp8_static.mend import mend

COUNTS = [3, 2, 4]
CONFIG = small_config(moe=True, num_experts_per_layer=COUNTS)
EXPERTS = "model.language_model.layers.1.experts."
LAYERS = [f"layers.{layer}.experts" for layer in range(3)]


@pytest.mark.parametrize("layout", ["indexed", "fused"])
def test_experts_are_counted_layer_by_layer(layout: str) -> None:
    assert set(LAYERS) <= int8_facts(CONFIG, int8_headers(CONFIG, layout)).int8
    found = fp8_facts(CONFIG, fp8_headers(CONFIG, layout)).fp8
    assert [found[layer] for layer in LAYERS] == COUNTS


@pytest.mark.parametrize(("dtype", "read", "headers"), [
    ("I8", int8_facts, int8_headers), ("F8_E4M3", fp8_facts, fp8_headers),
], ids=["int8", "fp8"])  # fmt: skip
def test_an_expert_that_only_other_layers_have_is_refused(dtype: str, read: Any, headers: Any) -> None:
    name = f"{EXPERTS}2.up_proj.weight"
    with pytest.raises(InputError, match=re.escape(f"tensor {name}: got expert 2, expected 0..1")):
        read(CONFIG, headers(CONFIG) | {name: Header(dtype, (32, 64))})


@pytest.mark.parametrize(("read", "headers"), [(int8_facts, int8_headers), (fp8_facts, fp8_headers)])
def test_fused_experts_of_another_count_are_refused(read: Any, headers: Any) -> None:
    whole = headers(CONFIG, "fused")
    name = f"{EXPERTS}down_proj"
    with pytest.raises(InputError, match=re.escape(f"tensor {name}: got {whole[name].dtype} [4, 64, 32], expected")):
        read(CONFIG, whole | {name: Header(whole[name].dtype, (4, 64, 32))})


def test_one_scale_is_for_as_many_experts_as_the_layer_has() -> None:
    found = fp8_facts(CONFIG, fp8_headers(CONFIG, "fused"))
    for layer, count in enumerate(COUNTS):
        name = f"model.layers.{layer}.experts.down_proj_scale"
        assert len(list(mend([(name, torch.tensor(0.5))], found))) == count


def test_unquantized_checkpoints_conform_layer_by_layer(tmp_path: Any) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "source", CONFIG))
    check_unquantized(parse_text_architecture(CONFIG), checkpoint.tensors)
    uniform = parse_text_architecture(small_config(moe=True))
    message = "layers.0.experts.gate_up_proj: got shape [3, 64, 64], expected [4, 64, 64]"
    with pytest.raises(InputError, match=re.escape(message)):
        check_unquantized(uniform, checkpoint.tensors)
