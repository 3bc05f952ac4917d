"""Headers decide what is FP8; what cannot be served right is refused by name; layouts become one while streaming."""

import pickle
import re
from dataclasses import dataclass

import pytest
import synthetic
import torch
from vllm_plugin.test_facts import Change, Header, Headers, _all, _drop, _set

from vllm_gemma4q.architecture import is_linear_weight, parse_text_architecture
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.fp8_static.facts import Facts, disagreements, read_facts
from vllm_gemma4q.fp8_static.ignore import IgnoreList
from vllm_gemma4q.fp8_static.mend import mend

DENSE, MOE = synthetic.small_config(), synthetic.small_config(moe=True)
ROOT = "model.language_model.layers."
EXPERTS = f"{ROOT}1.experts."
TOWER = "model.vision_tower.encoder.layers.0.mlp.up_proj.linear"
E4M3 = torch.float8_e4m3fn


def _fp8(module: str, shape: tuple[int, ...], scale: tuple[int, ...] = ()) -> Headers:
    weight_scale, input_scale = Header("F32", scale), Header("F32", ())
    weight = Header("F8_E4M3", shape)
    return {f"{module}.weight": weight, f"{module}.weight_scale": weight_scale, f"{module}.input_scale": input_scale}


def fp8_headers(config: dict, experts: str = "indexed") -> Headers:
    """Every linear of the language model in FP8; experts "indexed", "fused" or "bf16"."""
    headers: Headers = {}
    for name, shape in synthetic.shapes(config).items():
        if not is_linear_weight(name, shape) or (len(shape) == 3 and experts == "bf16"):
            headers[name] = Header("BF16", shape)
        elif len(shape) == 2:
            headers |= _fp8(name.removesuffix(".weight"), shape)
        elif experts == "fused":
            scales = {f"{name}_scale": Header("F32", shape[:1]), f"{name}_input_scale": Header("F32", ())}
            headers |= {name: Header("F8_E4M3", shape)} | scales
        else:
            prefix, _, part = name.rpartition(".")
            shards = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
            for expert in range(shape[0]):
                for shard in shards:
                    headers |= _fp8(f"{prefix}.{expert}.{shard}", (shape[1] // len(shards), shape[2]))
    return headers


def facts(config: dict, headers: Headers, ignored: list[str] | None = None) -> Facts:
    return read_facts(parse_text_architecture(config), headers, IgnoreList(ignored or []))


def test_every_linear_of_a_dense_model_is_fp8() -> None:
    found = facts(DENSE, fp8_headers(DENSE))
    assert not found.unquantized and not found.leftovers
    assert found.fp8["layers.0.self_attn.q_proj"] == 64 and found.fp8["layers.0.mlp.up_proj"] == 96
    assert "layers.2.self_attn.v_proj" not in found.fp8
    assert len(found.fp8) == 3 * 7 - 1
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize(("experts", "fp8"), [("indexed", True), ("fused", True), ("bf16", False)])
def test_layouts_of_experts(experts: str, fp8: bool) -> None:
    found = facts(MOE, fp8_headers(MOE, experts))
    assert ("layers.1.experts" in found.fp8) is fp8 and ("layers.1.experts" in found.unquantized) is not fp8
    assert not found.channel_experts and found.fp8.get("layers.1.experts", 4) == 4


def test_the_engines_names() -> None:
    found = facts(MOE, fp8_headers(MOE))
    for root in ("language_model.model.", "model."):
        for module in ("layers.2.self_attn.qkv_proj", "layers.0.mlp.gate_up_proj", "layers.1.experts"):
            assert found.is_fp8(root + module)
        assert not found.is_fp8(f"{root}layers.0.router.proj")
    assert not found.is_fp8("vision_tower.encoder.layers.0.mlp.gate_proj.linear")


@pytest.mark.parametrize("shape", [(), (1,), (64,), (64, 1)], ids=str)
def test_shapes_of_scales(shape: tuple[int, ...]) -> None:
    headers = fp8_headers(DENSE) | {f"{ROOT}0.self_attn.q_proj.weight_scale": Header("BF16", shape)}
    assert facts(DENSE, headers) == facts(DENSE, fp8_headers(DENSE))


def test_experts_with_a_scale_a_row() -> None:
    headers = fp8_headers(MOE)
    for name in [name for name in headers if ".experts." in name and name.endswith(".weight_scale")]:
        headers[name] = Header("F32", (headers[name.removesuffix("_scale")].shape[0], 1))
    assert facts(MOE, headers).channel_experts == {f"layers.{layer}.experts" for layer in range(3)}


Q, UP = f"{ROOT}0.self_attn.q_proj", f"{ROOT}0.mlp.up_proj"
ORPHAN = "weight_scale: got a scale, expected none: there is no such weight"
REFUSED: dict[str, tuple[Change, str]] = {
    "no weight scale": (
        _drop(r"0\.self_attn\.q_proj\.weight_scale"),
        f"tensor {Q}.weight_scale: got nothing (missing), expected BF16 or F16 or F32 [] or [1] or [64] or [64, 1]",
    ),
    "no input scale": (
        _drop(r"0\.self_attn\.q_proj\.input_scale"),
        f"tensor {Q}.input_scale: got nothing (missing), expected BF16 or F16 or F32 [] or [1]",
    ),
    "scale of another length": (_set(f"{Q}.weight_scale", "F32", 32), f"tensor {Q}.weight_scale: got F32 [32]"),
    "other codes": (
        _set(f"{Q}.weight", "F8_E5M2", 64, 64),
        f"tensor {Q}.weight: got F8_E5M2 [64, 64], expected F8_E4M3",
    ),
    "mixed q and k": (
        _all(_set(f"{Q}.weight", "BF16", 64, 64), _drop(r"0\.self_attn\.q_proj\.(weight|input)_scale")),
        f"tensor {Q}.weight: got BF16, expected F8_E4M3 like {ROOT}0.self_attn.k_proj.weight: shards of qkv_proj",
    ),
    "scale of a float weight": (
        _set(f"{UP}.weight", "BF16", 96, 64),
        f"tensor {UP}.weight: got BF16, expected F8_E4M3 like {ROOT}0.mlp.gate_proj.weight",
    ),
    "tower": (
        _set(f"{TOWER}.weight", "F8_E4M3", 48, 32),
        f"tensor {TOWER}.weight: got F8_E4M3, expected BF16: vision is never quantized; `gemma4q restore",
    ),
    "embedding": (
        _set("model.language_model.embed_tokens.weight", "F8_E4M3", 256, 64),
        "embedding is never quantized; `gemma4q restore QUANT BASE DST` mends it",
    ),
    "norm": (_set(f"{ROOT}0.input_layernorm.weight", "F8_E4M3", 64), "norm is never quantized"),
    "leftover that no list covers": (
        _set(f"{TOWER}.weight_scale", "F32"),
        f"tensor {TOWER}.weight_scale: got a scale, but its module is not quantized and not on the list of ignored "
        "modules; `gemma4q restore",
    ),
}
REFUSED_EXPERTS: dict[str, tuple[Change, str]] = {
    "router": (
        _set(f"{ROOT}1.router.proj.weight", "F8_E4M3", 4, 64),
        f"tensor {ROOT}1.router.proj.weight: got F8_E4M3, expected BF16: router is never quantized; `gemma4q restore",
    ),
    "expert missing": (_drop(r"1\.experts\.3\."), f"tensor {EXPERTS}3.gate_proj.weight: got nothing (missing)"),
    "expert too many": (_set(f"{EXPERTS}4.up_proj.weight", "F8_E4M3", 32, 64), "got expert 4, expected 0..3"),
    "one in bf16": (
        _all(_set(f"{EXPERTS}3.up_proj.weight", "BF16", 32, 64), _drop(r"1\.experts\.3\.up_proj\.\w+_scale")),
        f"tensor {EXPERTS}3.up_proj.weight: got BF16, expected F8_E4M3 like {EXPERTS}0.gate_proj.weight: experts",
    ),
    "one with a scale a row": (
        _set(f"{EXPERTS}3.up_proj.weight_scale", "F32", 32),
        f"tensor {EXPERTS}3.up_proj.weight: got a scale a row, expected one for all rows",
    ),
    "scale of fused experts": (
        _set(f"{EXPERTS}gate_up_proj.weight_scale", "F32", 4),
        f"{EXPERTS}gate_up_proj.{ORPHAN}",
    ),
    "scale of a dropped expert": (_set(f"{EXPERTS}4.up_proj.weight_scale", "F32"), f"{EXPERTS}4.up_proj.{ORPHAN}"),
    "fused beside indexed": (
        _set(f"{EXPERTS}gate_up_proj", "BF16", 4, 64, 64),
        f"tensor {EXPERTS}gate_up_proj: got fused experts, expected none beside",
    ),
}
REFUSED_FUSED: dict[str, tuple[Change, str]] = {
    "no scale": (
        _drop(r"1\.experts\.down_proj_scale"),
        f"tensor {EXPERTS}down_proj.weight_scale: got nothing (missing)",
    ),
    "no input scale": (
        _drop(r"1\.experts\.down_proj_input_scale"),
        f"tensor {EXPERTS}down_proj.input_scale: got nothing (missing)",
    ),
    "scale of another shape": (_set(f"{EXPERTS}down_proj_scale", "F32", 4, 2), "got F32 [4, 2], expected"),
    "scale of one expert": (_set(f"{EXPERTS}0.up_proj.weight_scale", "F32"), f"{EXPERTS}0.up_proj.{ORPHAN}"),
}


def _refuse(config: dict, headers: Headers, change: Change, message: str) -> None:
    facts(config, headers)
    change(headers)
    with pytest.raises(InputError, match=re.escape(message)):
        facts(config, headers)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    _refuse(DENSE, fp8_headers(DENSE), *REFUSED[case])


@pytest.mark.parametrize("case", REFUSED_EXPERTS)
def test_refused_experts(case: str) -> None:
    _refuse(MOE, fp8_headers(MOE), *REFUSED_EXPERTS[case])


@pytest.mark.parametrize("case", REFUSED_FUSED)
def test_refused_fused_experts(case: str) -> None:
    _refuse(MOE, fp8_headers(MOE, "fused"), *REFUSED_FUSED[case])


@pytest.mark.parametrize("entry", [TOWER, "vision_tower", "re:.*vision.*", "model.vision_tower", "*vision_tower*"])
def test_leftovers_that_a_list_covers_are_dropped(entry: str) -> None:
    scales = {f"{TOWER}.{leaf}": Header("F32", ()) for leaf in ("weight_scale", "input_scale")}
    assert facts(DENSE, fp8_headers(DENSE) | scales, [entry]).leftovers == set(scales)


def test_leftovers_of_restored_layers_and_of_absent_values() -> None:
    headers = fp8_headers(DENSE)
    for shard in "qko":
        name = f"{ROOT}2.self_attn.{shard}_proj.weight"
        headers[name] = Header("BF16", headers[name].shape)
    virtual = f"{ROOT}2.self_attn.v_proj.input_scale"
    found = facts(DENSE, headers | {virtual: Header("F32", ())}, ["model.language_model.layers.2.self_attn"])
    expected = {f"{ROOT}2.self_attn.{shard}_proj.{leaf}_scale" for shard in "qko" for leaf in ("weight", "input")}
    assert found.leftovers == expected | {virtual}
    assert "layers.2.self_attn.q_proj" in found.unquantized


def test_scales_of_the_kv_cache_are_no_leftovers() -> None:
    scales = {f"{ROOT}0.self_attn.{leaf}": Header("F32", ()) for leaf in ("k_scale", "v_scale", "k_proj.output_scale")}
    assert not facts(DENSE, fp8_headers(DENSE) | scales).leftovers


def test_disagreements() -> None:
    architecture, found = parse_text_architecture(MOE), facts(MOE, fp8_headers(MOE))
    assert disagreements(architecture, found, IgnoreList(["vision_tower", "router", "lm_head"])) == []
    assert disagreements(architecture, found, IgnoreList(["layers.0.mlp.up_proj"])) == [UP]
    bf16 = facts(MOE, fp8_headers(MOE, "bf16"))
    assert disagreements(architecture, bf16, IgnoreList([])) == [f"{ROOT}{layer}.experts" for layer in range(3)]
    assert disagreements(architecture, bf16, IgnoreList(["experts"])) == []


@dataclass
class Layer:
    """One linear and fused experts of three, as they stream by."""

    facts = Facts({"layers.1.mlp.up_proj": 4, "layers.1.experts": 3}, frozenset(), frozenset(), frozenset())
    prefix = "model.layers.1."


def test_scales_of_linears_become_columns() -> None:
    name = f"{Layer.prefix}mlp.up_proj.weight_scale"
    for scale in (torch.tensor(0.5), torch.tensor([0.5]), torch.full((4,), 0.5), torch.full((4, 1), 0.5).bfloat16()):
        [(got, column)] = mend([(name, scale)], Layer.facts)
        assert got == name and column.dtype == torch.float32 and column.tolist() == [[0.5]] * 4


def test_columns_of_experts_become_vectors() -> None:
    name = f"{Layer.prefix}experts.2.up_proj.weight_scale"
    for scale, expected in ((torch.ones(4, 1), [1.0] * 4), (torch.tensor(1.0), 1.0)):
        [(got, vector)] = mend([(name, scale)], Layer.facts)
        assert got == name and vector.tolist() == expected


def test_other_tensors_pass_and_leftovers_do_not() -> None:
    kept = [("model.layers.1.mlp.down_proj.weight_scale", torch.tensor(1.0)), ("model.norm.weight", torch.ones(2))]
    known = Facts({}, frozenset(), frozenset(), frozenset({"model.language_model.layers.0.mlp.up_proj.input_scale"}))
    dropped = ("model.layers.0.mlp.up_proj.input_scale", torch.tensor(1.0))
    assert [id(tensor) for _, tensor in mend([*kept, dropped], known)] == [id(tensor) for _, tensor in kept]


def test_fused_weights_are_split() -> None:
    gate_up, down = torch.randn(3, 4, 8).to(E4M3), torch.randn(3, 8, 2).to(E4M3)
    prefix = f"{Layer.prefix}experts."
    got = dict(mend([(f"{prefix}gate_up_proj", gate_up), (f"{prefix}down_proj.weight", down)], Layer.facts))
    assert len(got) == 9
    for expert in range(3):
        assert torch.equal(got[f"{prefix}{expert}.gate_proj.weight"].float(), gate_up[expert, :2].float())
        assert torch.equal(got[f"{prefix}{expert}.up_proj.weight"].float(), gate_up[expert, 2:].float())
        assert torch.equal(got[f"{prefix}{expert}.down_proj.weight"].float(), down[expert].float())


@pytest.mark.parametrize(
    ("scale", "gate", "up"),
    [
        (torch.tensor(2.0), [2.0] * 3, [2.0] * 3),
        (torch.tensor([1.0, 2.0, 3.0]), [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        (torch.tensor([[[1.0]], [[2.0]], [[3.0]]]), [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        (torch.tensor([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]), [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]),
        (
            torch.arange(12.0).reshape(3, 4),
            [[0.0, 1.0], [4.0, 5.0], [8.0, 9.0]],
            [[2.0, 3.0], [6.0, 7.0], [10.0, 11.0]],
        ),
    ],
    ids=["one", "each", "each-3d", "gate-and-up", "rows"],
)
@pytest.mark.parametrize("suffix", ["_scale", ".weight_scale", "_weight_scale", ".scale"])
def test_fused_scales_are_split(suffix: str, scale: torch.Tensor, gate: list, up: list) -> None:
    prefix = f"{Layer.prefix}experts."
    got = dict(mend([(f"{prefix}gate_up_proj{suffix}", scale)], Layer.facts))
    assert [got[f"{prefix}{expert}.gate_proj.weight_scale"].tolist() for expert in range(3)] == gate
    assert [got[f"{prefix}{expert}.up_proj.weight_scale"].tolist() for expert in range(3)] == up


def test_fused_input_scales_are_split() -> None:
    prefix = f"{Layer.prefix}experts."
    got = dict(mend([(f"{prefix}down_proj_input_scale", torch.tensor([1.0, 2.0, 3.0]))], Layer.facts))
    assert [got[f"{prefix}{expert}.down_proj.input_scale"].tolist() for expert in range(3)] == [1.0, 2.0, 3.0]


def test_unquantized_fused_experts_stay_whole() -> None:
    experts = torch.rand(3, 4, 5).bfloat16()
    [(name, got)] = mend([(f"{Layer.prefix}experts.gate_up_proj.weight", experts)], Layer.facts)
    assert name == f"{Layer.prefix}experts.gate_up_proj" and got is experts
