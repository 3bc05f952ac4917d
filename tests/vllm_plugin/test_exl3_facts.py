"""Headers decide which linears are packed, and how; what cannot be served right is refused by name."""

import pickle
import re
from collections.abc import Callable
from itertools import cycle, pairwise
from pathlib import Path

import pytest
import synthetic
import torch
from vllm_plugin.test_facts import Header, Headers

from vllm_gemma4q.architecture import Role, is_linear_weight, parse_text_architecture, role_of
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.exl3.facts import Facts, Packed, read_facts
from vllm_gemma4q.exl3.mend import mend
from vllm_gemma4q.exl3.storage import FILE, disagreements, read_storage

DENSE, MOE = synthetic.small_config(), synthetic.small_config(moe=True)
LAYERS = "model.language_model.layers."
Q_PROJ, EXPERTS = f"{LAYERS}0.self_attn.q_proj", f"{LAYERS}1.experts."
FORMATS = (("mcg", 64), ("mul1", 56), ("3inst", 16), ("mcg", 128))


def headers_of(config: dict) -> Headers:
    """Every linear of the language model packed, and the output layer, in formats that alternate."""
    formats = cycle(FORMATS)
    headers: Headers = {}
    linears = {"lm_head": (config["text_config"]["vocab_size"], config["text_config"]["hidden_size"])}
    for name, shape in synthetic.shapes(config).items():
        if not is_linear_weight(name, shape):
            headers[name] = Header("BF16", shape)
        elif len(shape) == 2:
            linears[name.removesuffix(".weight")] = shape
        else:
            linears |= _experts(name, shape)
    for module, shape in linears.items():
        headers |= packed(module, shape, *next(formats))
    return headers


def packed(module: str, shape: tuple[int, ...], codebook: str, width: int) -> Headers:
    """Tensors of one linear [out, in]."""
    out_features, in_features = (-(-size // 128) * 128 for size in shape)
    headers = {
        f"{module}.trellis": Header("I16", (in_features // 16, out_features // 16, width)),
        f"{module}.suh": Header("F16", (in_features,)),
        f"{module}.svh": Header("F16", (out_features,)),
    }
    return headers if codebook == "3inst" else headers | {f"{module}.{codebook}": Header("I32", ())}


def _experts(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    prefix, _, part = name.rpartition(".")
    shards = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
    rows = shape[1] // len(shards)
    return {f"{prefix}.{expert}.{shard}": (rows, shape[2]) for expert in range(shape[0]) for shard in shards}


def facts(config: dict, headers: Headers) -> Facts:
    return read_facts(parse_text_architecture(config), headers)


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_every_linear_has_its_own_format(config: dict) -> None:
    headers = headers_of(config)
    found = facts(config, headers)
    assert not found.unquantized
    assert {packed[2:] for packed in found.linears.values()} == {(width, codebook) for codebook, width in FORMATS}
    for name, header in headers.items():
        if name.endswith(".trellis"):
            module = name.removesuffix(".trellis").removeprefix("model.language_model.")
            assert found.linears[module].width == header.shape[2]
    assert found.linears["layers.2.self_attn.q_proj"][:2] == (64, 128)
    assert found.is_packed("language_model.model.layers.1.mlp.gate_up_proj")
    assert "lm_head" in found.linears and not found.is_packed("vision_tower.encoder.layers.0.mlp.up_proj")
    assert pickle.loads(pickle.dumps(found)) == found


def test_shards_of_fused_linears() -> None:
    found = facts(DENSE, headers_of(DENSE))
    query, key, value = found.shards("language_model.model.layers.0.self_attn.qkv_proj")
    assert query and key and value and query.out_features == 64 and key.out_features == value.out_features == 32
    assert found.shards("model.layers.2.self_attn.qkv_proj")[2] is None  # values are the keys
    assert [shard and shard.in_features for shard in found.shards("model.layers.2.mlp.down_proj")] == [96]


def test_experts_by_number() -> None:
    found = facts(MOE, headers_of(MOE)).experts("language_model.model.layers.1.experts")
    assert set(found) == {f"{expert}.{shard}_proj" for expert in range(4) for shard in ("gate", "up", "down")}
    assert found["3.down_proj"][:2] == (32, 64)


def test_what_is_not_packed_stays_as_it_is() -> None:
    dense = (f"{LAYERS}0.mlp.", EXPERTS)
    headers = _without(headers_of(MOE), lambda name: name.startswith((*dense, "lm_head.")))
    headers |= {name: Header("F16", shape) for name, shape in synthetic.shapes(MOE).items() if name.startswith(dense)}
    found = facts(MOE, headers)
    assert found.unquantized == {
        *(f"layers.0.mlp.{shard}_proj" for shard in ("gate", "up", "down")),
        "layers.1.experts",
    }
    assert "lm_head" not in found.linears


def test_text_only_checkpoints() -> None:
    config = {**DENSE["text_config"], "architectures": ["Gemma4ForCausalLM"]}
    headers = {
        name.replace("model.language_model.", "model."): header
        for name, header in headers_of(DENSE).items()
        if role_of(name) not in (Role.VISION, Role.EMBED_VISION)
    }
    assert facts(config, headers) == facts(DENSE, headers_of(DENSE))


def test_untied_configurations_need_no_weight_of_a_packed_output_layer() -> None:
    config = {**DENSE, "tie_word_embeddings": False}
    assert "lm_head" in facts(config, headers_of(DENSE)).linears
    headers = _without(headers_of(DENSE), lambda name: name.startswith("lm_head."))
    with pytest.raises(InputError, match=r"tensor lm_head\.weight: got nothing"):
        facts(config, headers)


def test_keys_of_layers_that_share_them_are_passed_over() -> None:
    config = synthetic.small_config(num_kv_shared_layers=1)
    headers = headers_of(config) | packed(f"{LAYERS}2.self_attn.k_proj", (32, 64), "mcg", 64)
    assert "layers.2.self_attn.k_proj" not in facts(config, headers).linears


def test_signs_of_old_files() -> None:
    headers = _without(headers_of(DENSE), lambda name: name in (f"{Q_PROJ}.suh", f"{Q_PROJ}.svh"))
    old = {f"{Q_PROJ}.su": Header("I16", (8,)), f"{Q_PROJ}.sv": Header("I16", (8,))}
    assert facts(DENSE, headers | old) == facts(DENSE, headers_of(DENSE))


def _without(headers: Headers, drop: Callable[[str], bool]) -> Headers:
    return {name: header for name, header in headers.items() if not drop(name)}


VISION = "model.vision_tower.encoder.layers.0.mlp.up_proj.linear"
BAD = {
    "missing": (f"{Q_PROJ}.suh", None, "got nothing (missing), expected F16 [128]"),
    "no-trellis": (f"{Q_PROJ}.trellis", None, "got nothing (missing), expected I16 [8, 8, 16] or"),
    "no-svh": (f"{EXPERTS}2.down_proj.svh", None, "got nothing (missing), expected F16 [128]"),
    "expert": (f"{EXPERTS}4.down_proj.svh", Header("F16", (128,)), "got expert 4, expected 0..3"),
    "shape": (f"{Q_PROJ}.trellis", Header("I16", (8, 16, 64)), "got I16 [8, 16, 64], expected I16 [8, 8, 16] or"),
    "width": (f"{Q_PROJ}.trellis", Header("I16", (8, 8, 72)), "got I16 [8, 8, 72], expected"),
    "dtype": (f"{Q_PROJ}.trellis", Header("I32", (8, 8, 64)), "got I32 [8, 8, 64], expected I16"),
    "signs": (f"{Q_PROJ}.svh", Header("BF16", (128,)), "got BF16 [128], expected F16 [128]"),
    "unpadded": (f"{Q_PROJ}.svh", Header("F16", (64,)), "got F16 [64], expected F16 [128]"),
    "both-signs": (f"{Q_PROJ}.su", Header("I16", (8,)), "got I16 [8], expected none beside"),
    "both-weights": (f"{Q_PROJ}.weight", Header("BF16", (64, 64)), "got BF16 [64, 64], expected only"),
    "bias": (f"{Q_PROJ}.bias", Header("F16", (64,)), "got F16 [64], expected only mcg, mul1, su, suh"),
    "codebook": (f"{Q_PROJ}.mul2", Header("I32", ()), "got I32 [], expected only mcg, mul1"),
    "vision": (f"{VISION}.trellis", Header("I16", (8, 8, 96)), "expected an unquantized tower: convert it"),
    "embeddings": ("model.language_model.embed_tokens.trellis", Header("I16", (8, 8, 96)), "expected none: this model"),
    "orphan": (f"{LAYERS}7.mlp.up_proj.suh", Header("F16", (128,)), "got F16 [128], expected none: this model has no"),
    "value": (f"{LAYERS}2.self_attn.v_proj.suh", Header("F16", (128,)), "expected none: this model has no"),
    "norm": (f"{LAYERS}0.input_layernorm.weight", None, "got nothing (missing)"),
    "router": (f"{LAYERS}0.router.proj.suh", Header("F16", (128,)), "expected none: this model has no"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused_by_name(case: str) -> None:
    name, header, message = BAD[case]
    headers = _without(headers_of(MOE), lambda other: other == name) | ({} if header is None else {name: header})
    with pytest.raises(InputError, match=rf"^tensor {re.escape(name)}: .*{re.escape(message)}"):
        facts(MOE, headers)


def test_two_codebooks_are_refused() -> None:
    headers = headers_of(DENSE) | {f"{Q_PROJ}.{name}": Header("I32", ()) for name in ("mcg", "mul1")}
    with pytest.raises(InputError, match=rf"^tensor {re.escape(Q_PROJ)}\.trellis: codebook: got markers"):
        facts(DENSE, headers)


def test_a_half_rate_needs_its_codebook() -> None:
    headers = headers_of(DENSE) | packed(Q_PROJ, (64, 64), "mcg", 56)
    headers = _without(headers, lambda name: name == f"{Q_PROJ}.mul1")
    with pytest.raises(InputError, match=r"got I16 \[8, 8, 56\]"):
        facts(DENSE, headers)


def test_partly_packed_shards_are_refused() -> None:
    headers = _without(headers_of(DENSE), lambda name: name.startswith(f"{LAYERS}0.mlp.up_proj."))
    headers[f"{LAYERS}0.mlp.up_proj.weight"] = Header("BF16", (96, 64))
    with pytest.raises(InputError, match=r"up_proj\.weight: got BF16, expected I16 like .*gate_proj"):
        facts(DENSE, headers)


def test_disagreements_with_the_storage_file() -> None:
    headers = headers_of(DENSE)
    storage = {
        Q_PROJ: {"stored_tensors": {f"{Q_PROJ}.trellis": {"shape": [8, 8, headers[f"{Q_PROJ}.trellis"].shape[2]]}}}
    }
    assert disagreements(storage, headers) == []
    storage[Q_PROJ]["stored_tensors"] |= {f"{Q_PROJ}.trellis": {"shape": [8, 8, 1]}, f"{Q_PROJ}.gone": {"shape": [1]}}
    assert disagreements(storage, headers) == [f"{Q_PROJ}.gone", f"{Q_PROJ}.trellis"]
    assert disagreements({"a": {}, "b": 3}, headers) == []


@pytest.mark.engine
def test_reading_the_storage_file(tmp_path: Path) -> None:
    assert read_storage(str(tmp_path), None) == {}  # old checkpoints
    for text, expected in (('{"bits": 4}', {}), ('{"tensor_storage": {"a": {}}}', {"a": {}})):
        (tmp_path / FILE).write_text(text)
        assert read_storage(str(tmp_path), None) == expected
    for text, message in (
        ("{", "got no JSON"),
        ("[]", "got list"),
        ('{"tensor_storage": 3}', "tensor_storage: got int"),
    ):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(InputError, match=rf"^quantization_config\.json: .*{message}.*, expected an object"):
            read_storage(str(tmp_path), None)


def test_signs_are_unpacked_and_markers_dropped_while_loading() -> None:
    found = facts(DENSE, headers_of(DENSE))
    name = "model.layers.0.self_attn.q_proj"
    tensors = [
        (f"{name}.su", torch.tensor([1, -32768] + [0] * 6, dtype=torch.int16)),
        (f"{name}.svh", torch.ones(128, dtype=torch.float16)),
        (f"{name}.mcg", torch.tensor(1)),
        ("model.vision.mcg", torch.tensor(1)),
    ]
    mended = dict(mend(tensors, found))
    assert list(mended) == [f"{name}.suh", f"{name}.svh", "model.vision.mcg"]
    assert mended[f"{name}.suh"].dtype is torch.float16
    assert (mended[f"{name}.suh"] < 0).nonzero().flatten().tolist() == [0, 31]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(value: float) -> None:
    name = f"{Q_PROJ}.svh"
    tensor = torch.tensor([1.0, value], dtype=torch.float16)
    with pytest.raises(InputError, match=rf"^tensor {re.escape(name)}: got NaN or infinity"):
        list(mend([(name, tensor)], facts(DENSE, headers_of(DENSE))))


def test_formats_alternate_among_fused_shards() -> None:
    """Or the tests above would not see a mistaken neighbour."""
    found = facts(DENSE, headers_of(DENSE))
    shards = [found.shards(f"model.layers.{layer}.self_attn.qkv_proj") for layer in range(2)]
    assert all(isinstance(a, Packed) and a.width != b.width for one in shards for a, b in pairwise(one) if b)
