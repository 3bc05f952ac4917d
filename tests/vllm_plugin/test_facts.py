"""Headers decide what is int8; what cannot be served right is refused by name."""

import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import synthetic

from vllm_gemma4q.architecture import Role, is_linear_weight, parse_text_architecture, role_of
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.quark_int8.facts import Facts, disagreements, read_facts

DENSE, MOE = synthetic.small_config(), synthetic.small_config(moe=True)
ROOT = "model.language_model.layers."
EXPERTS = f"{ROOT}1.experts."


@dataclass(frozen=True)
class Header:
    dtype: str
    shape: tuple[int, ...]


Headers = dict[str, Header]


def int8_headers(config: dict, experts: str = "indexed") -> Headers:
    """Every linear of the language model in int8; experts "indexed", "fused" or "bf16"."""
    headers: Headers = {}
    for name, shape in synthetic.shapes(config).items():
        if not is_linear_weight(name, shape):
            headers[name] = Header("BF16", shape)
        elif len(shape) == 2:
            headers |= _int8(name.removesuffix(".weight"), shape)
        elif experts == "bf16":
            headers[name] = Header("BF16", shape)
        elif experts == "fused":
            headers |= {name: Header("I8", shape), f"{name}_scale": Header("F32", shape[:2])}
        else:
            headers |= _indexed(name, shape)
    return headers


def _int8(module: str, shape: tuple[int, ...], scale: str = "F32") -> Headers:
    return {f"{module}.weight": Header("I8", shape), f"{module}.weight_scale": Header(scale, shape[:1])}


def _indexed(name: str, shape: tuple[int, ...]) -> Headers:
    prefix, _, part = name.rpartition(".")
    linears = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
    headers: Headers = {}
    for expert in range(shape[0]):
        for linear in linears:
            headers |= _int8(f"{prefix}.{expert}.{linear}", (shape[1] // len(linears), shape[2]))
    return headers


def facts(config: dict, headers: Headers) -> Facts:
    return read_facts(parse_text_architecture(config), headers)


def test_every_linear_of_a_dense_model_is_int8() -> None:
    found = facts(DENSE, int8_headers(DENSE))
    assert not found.unquantized and not found.int8_norms
    assert {f"layers.0.self_attn.{shard}_proj" for shard in "qkvo"} <= found.int8
    assert "layers.2.self_attn.k_proj" in found.int8 and "layers.2.self_attn.v_proj" not in found.int8
    assert len(found.int8) == 3 * 7 - 1


@pytest.mark.parametrize("experts, int8", [("indexed", True), ("fused", True), ("bf16", False)])
def test_layouts_of_experts(experts: str, int8: bool) -> None:
    found = facts(MOE, int8_headers(MOE, experts))
    assert ("layers.1.experts" in found.int8) is int8
    assert ("layers.1.experts" in found.unquantized) is not int8


def test_facts_survive_pickling() -> None:
    found = facts(MOE, int8_headers(MOE))
    assert pickle.loads(pickle.dumps(found)) == found


def test_text_only_checkpoints() -> None:
    config = {**DENSE["text_config"], "architectures": ["Gemma4ForCausalLM"]}
    headers = {
        name.replace("model.language_model.", "model."): header
        for name, header in int8_headers(DENSE).items()
        if role_of(name) not in (Role.VISION, Role.EMBED_VISION)
    }
    assert facts(config, headers) == facts(DENSE, int8_headers(DENSE))


def test_norms_in_int8_are_noted() -> None:
    norm = f"{ROOT}1.post_feedforward_layernorm_1"
    found = facts(MOE, int8_headers(MOE) | _int8(norm, (64,), "BF16"))
    assert found.int8_norms == {"layers.1.post_feedforward_layernorm_1"}


def test_scales_may_be_columns() -> None:
    headers = int8_headers(DENSE)
    columns = {name: Header(h.dtype, (*h.shape, 1)) if name.endswith("_scale") else h for name, h in headers.items()}
    assert facts(DENSE, columns) == facts(DENSE, headers)


def test_a_layer_whose_attention_stays_bf16() -> None:
    prefix = f"{ROOT}2.self_attn."
    bf16 = {name: Header("BF16", shape) for name, shape in synthetic.shapes(DENSE).items()}
    headers = {name: header for name, header in int8_headers(DENSE).items() if not name.startswith(prefix)}
    found = facts(DENSE, headers | {name: header for name, header in bf16.items() if name.startswith(prefix)})
    assert found.unquantized == {f"layers.2.self_attn.{shard}_proj" for shard in "qko"}


@pytest.mark.parametrize("root", ["language_model.model.", "model."])
def test_the_engines_names(root: str) -> None:
    config = synthetic.small_config(hidden_size_per_layer_input=16, vocab_size_per_layer_input=256)
    found = facts(config, int8_headers(config))
    for module in ("layers.2.self_attn.qkv_proj", "layers.0.mlp.gate_up_proj", "layers.0.self_attn.o_proj"):
        assert found.is_int8(root + module)
    assert found.is_int8(f"{root}per_layer_model_projection")
    assert found.is_int8(f"{root}layers.1.per_layer_input_gate")
    assert not found.is_int8(f"{root}layers.0.router.proj")
    assert not found.is_int8("vision_tower.encoder.layers.0.mlp.gate_proj.linear")
    assert facts(MOE, int8_headers(MOE)).is_int8(f"{root}layers.1.experts")


Change = Callable[[Headers], None]


def _set(name: str, dtype: str, *shape: int) -> Change:
    return lambda headers: headers.update({name: Header(dtype, shape)})


def _drop(pattern: str) -> Change:
    def change(headers: Headers) -> None:
        found = [name for name in headers if re.search(pattern, name)]
        assert found
        for name in found:
            del headers[name]

    return change


def _all(*changes: Change) -> Change:
    def change(headers: Headers) -> None:
        for one in changes:
            one(headers)

    return change


Q, K, GATE, DOWN = (
    f"{ROOT}0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
)
REFUSED = {
    "missing scale": (
        _drop(r"0\.self_attn\.q_proj\.weight_scale"),
        f"tensor {Q}.weight_scale: got nothing (missing), expected BF16 or F16 or F32 [64] or [64, 1]",
    ),
    "missing weight": (_drop(r"0\.mlp\.down_proj\.weight$"), f"tensor {DOWN}.weight: got nothing (missing)"),
    "scale of another length": (
        _set(f"{Q}.weight_scale", "F32", 32),
        f"tensor {Q}.weight_scale: got F32 [32], expected BF16 or F16 or F32 [64] or [64, 1]",
    ),
    "one scale for all rows": (_set(f"{Q}.weight_scale", "F32"), f"tensor {Q}.weight_scale: got F32 [], expected"),
    "scale in int8": (_set(f"{Q}.weight_scale", "I8", 64), f"tensor {Q}.weight_scale: got I8 [64], expected BF16"),
    "weight of another shape": (
        _set(f"{Q}.weight", "I8", 32, 64),
        f"tensor {Q}.weight: got I8 [32, 64], expected I8 or BF16 or F16 or F32 [64, 64]",
    ),
    "weight in fp8": (_set(f"{Q}.weight", "F8_E4M3", 64, 64), f"tensor {Q}.weight: got F8_E4M3 [64, 64], expected I8"),
    "packed int4": (_set(f"{Q}.weight", "I32", 64, 8), f"tensor {Q}.weight: got I32 [64, 8], expected I8"),
    "scale without int8": (
        _set(f"{DOWN}.weight", "BF16", 64, 96),
        f"tensor {DOWN}.weight_scale: got a scale, expected none: {DOWN}.weight is not int8",
    ),
    "mixed q and k": (
        _all(_set(f"{K}.weight", "BF16", 32, 64), _drop(r"0\.self_attn\.k_proj\.weight_scale")),
        f"tensor {K}.weight: got BF16, expected I8 like {Q}.weight: shards of qkv_proj share one scheme",
    ),
    "mixed gate and up": (
        _all(_set(f"{GATE}.weight", "BF16", 96, 64), _drop(r"0\.mlp\.gate_proj\.weight_scale")),
        f"tensor {GATE}.weight: got BF16, expected I8 like {ROOT}0.mlp.up_proj.weight: shards of gate_up_proj",
    ),
    "static activations": (
        _set(f"{Q}.input_scale", "F32", 1),
        f"tensor {Q}.input_scale: got a static activation scale, expected none",
    ),
    "int8 vision tower": (
        _set("model.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight", "I8", 48, 32),
        "tensor model.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight: got I8, expected BF16: "
        "vision is never quantized",
    ),
    "int8 embedding": (
        _set("model.language_model.embed_tokens.weight", "I8", 256, 64),
        "tensor model.language_model.embed_tokens.weight: got I8, expected BF16: embedding is never quantized",
    ),
    "missing norm": (_drop(r"0\.input_layernorm"), f"tensor {ROOT}0.input_layernorm.weight: got nothing (missing)"),
}
REFUSED_EXPERTS = {
    "expert missing": (
        _drop(r"1\.experts\.3\."),
        f"tensor {EXPERTS}3.gate_proj.weight: got nothing (missing), expected I8 or BF16 or F16 or F32 [32, 64]",
    ),
    "one linear of an expert missing": (
        _drop(r"1\.experts\.2\.up_proj\.weight$"),
        f"tensor {EXPERTS}2.up_proj.weight: got nothing (missing)",
    ),
    "rows missing": (
        _set(f"{EXPERTS}2.up_proj.weight", "I8", 31, 64),
        f"tensor {EXPERTS}2.up_proj.weight: got I8 [31, 64], expected I8 or BF16 or F16 or F32 [32, 64]",
    ),
    "expert too many": (
        _set(f"{EXPERTS}4.up_proj.weight", "I8", 32, 64),
        f"tensor {EXPERTS}4.up_proj.weight: got expert 4, expected 0..3",
    ),
    "missing scale": (
        _drop(r"1\.experts\.3\.down_proj\.weight_scale"),
        f"tensor {EXPERTS}3.down_proj.weight_scale: got nothing (missing), expected BF16 or F16 or F32 [64] or [64, 1]",
    ),
    "one expert in bf16": (
        _all(_set(f"{EXPERTS}3.up_proj.weight", "BF16", 32, 64), _drop(r"1\.experts\.3\.up_proj\.weight_scale")),
        f"tensor {EXPERTS}3.up_proj.weight: got BF16, expected I8 like {EXPERTS}0.gate_proj.weight: experts of a layer",
    ),
    "fused beside indexed": (
        _set(f"{EXPERTS}gate_up_proj", "BF16", 4, 64, 64),
        f"tensor {EXPERTS}gate_up_proj: got fused experts, expected none beside",
    ),
    "router in int8": (
        _set(f"{ROOT}1.router.proj.weight", "I8", 4, 64),
        f"tensor {ROOT}1.router.proj.weight: got I8, expected BF16: router is never quantized",
    ),
}
REFUSED_FUSED = {
    "experts short": (
        _set(f"{EXPERTS}down_proj", "I8", 3, 64, 32),
        f"tensor {EXPERTS}down_proj: got I8 [3, 64, 32], expected I8 or BF16 or F16 or F32 [4, 64, 32]",
    ),
    "missing scale": (
        _drop(r"1\.experts\.down_proj_scale"),
        f"tensor {EXPERTS}down_proj.weight_scale: got nothing (missing), expected BF16 or F16 or F32 [4, 64]",
    ),
    "one half in bf16": (
        _set(f"{EXPERTS}down_proj", "BF16", 4, 64, 32),
        f"tensor {EXPERTS}down_proj: got BF16, expected I8 like {EXPERTS}gate_up_proj: experts of a layer share",
    ),
}


def _refuse(config: dict, headers: Headers, change: Change, message: str) -> None:
    facts(config, headers)
    change(headers)
    with pytest.raises(InputError, match=re.escape(message)):
        facts(config, headers)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    _refuse(DENSE, int8_headers(DENSE), *REFUSED[case])


@pytest.mark.parametrize("case", REFUSED_EXPERTS)
def test_refused_experts(case: str) -> None:
    _refuse(MOE, int8_headers(MOE), *REFUSED_EXPERTS[case])


@pytest.mark.parametrize("case", REFUSED_FUSED)
def test_refused_fused_experts(case: str) -> None:
    _refuse(MOE, int8_headers(MOE, "fused"), *REFUSED_FUSED[case])


@pytest.mark.parametrize(
    "exclude, wrong",
    [
        ([], []),
        (["*vision_tower*", "lm_head", "re:.*router.*"], []),
        (["model.language_model.layers.0.mlp.up_proj"], ["model.language_model.layers.0.mlp.up_proj"]),
        (
            ["language_model.model.layers.2.self_attn.qkv_proj"],
            [f"{ROOT}2.self_attn.k_proj", f"{ROOT}2.self_attn.q_proj"],
        ),
        (["*layers.1.experts*"], [f"{ROOT}1.experts"]),
        (["model.language_model.layers.1.experts.0.up_proj"], [f"{ROOT}1.experts"]),
    ],
)
def test_what_an_exclude_list_gets_wrong(exclude: list[str], wrong: list[str]) -> None:
    architecture = parse_text_architecture(MOE)
    assert disagreements(architecture, facts(MOE, int8_headers(MOE)), exclude) == wrong


def test_experts_kept_but_not_excluded_are_a_disagreement() -> None:
    found = facts(MOE, int8_headers(MOE, "bf16"))
    architecture = parse_text_architecture(MOE)
    assert disagreements(architecture, found, []) == [f"{ROOT}{layer}.experts" for layer in range(3)]
    assert disagreements(architecture, found, ["*.experts.*"]) == []
