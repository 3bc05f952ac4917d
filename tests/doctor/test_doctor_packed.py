"""Weights of which an element holds several, and methods that are vLLM's own: by headers alone."""

import math

import pytest
from doctor.packed_checkpoints import FORMATS, compressed, write_packed
from synthetic import shapes, small_config

from vllm_gemma4q.architecture import is_linear_weight, role_of
from vllm_gemma4q.doctor import stock
from vllm_gemma4q.doctor.checks.coverage import coverage
from vllm_gemma4q.doctor.diagnose import diagnose
from vllm_gemma4q.doctor.engines import EXLLAMAV3, VLLM, VLLM_STOCK, parse_engine
from vllm_gemma4q.doctor.subject import open_subject

BOTH = (VLLM, VLLM_STOCK)
LAYER = "model.language_model.layers.0."
FILES = {"missing-tokenizer", "missing-processor", "missing-generation-config", "missing-chat-template"}
GROUPED = ("w4a16", "nvfp4")  # those of compressed-tensors, whose scales are checked
PATTERN = "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear"


def findings(folder, engine):
    """By code, without those of files that are not written here."""
    found = diagnose(open_subject(folder, None), parse_engine(engine)).findings
    return {finding.code: finding for finding in found if finding.code not in FILES}


def not_towers(name):
    """Linears of the layers alone."""
    return "vision_tower" not in name


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("form", FORMATS)
def test_packed_weights_are_weights(form, moe, engine, tmp_path):
    """None is missing, all are quantized, and what is not checked is said so."""
    folder = write_packed(tmp_path / "packed", form, moe, not_towers)
    assert set(findings(folder, engine)) == ({"not-checked"} if form not in GROUPED else set())


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("form", FORMATS)
def test_coverage_counts_packed_weights(form, moe, tmp_path):
    """Half of the feed-forward is left as it is: both halves count by their weights, whatever an element holds."""
    folder = write_packed(tmp_path / "packed", form, moe, lambda name: not_towers(name) and ".mlp.up_proj" not in name)
    expected: dict[str, list[int]] = {}
    for name, shape in shapes(small_config(moe)).items():
        if is_linear_weight(name, shape):
            counts = expected.setdefault(role_of(name).value, [0, 0])
            counts[0] += math.prod(shape) * (".mlp.up_proj" not in name)
            counts[1] += math.prod(shape)
    found = coverage(open_subject(folder, None))
    assert {role: list(found[role]) for role in expected} == expected


def test_coverage_of_several_widths(tmp_path):
    """FP8 in a group of its own does not halve what an I32 holds, nor does nonsense."""
    own = compressed("pack-quantized", "int")
    groups = {"group_0": {"weights": {"num_bits": 8}}, "a": 5, "b": {"weights": {"num_bits": True}}, "c": {},
              "group_1": own["config_groups"]["group_0"]}  # fmt: skip
    whole = coverage(open_subject(write_packed(tmp_path / "one", "w4a16", quantization=own), None))
    subject = open_subject(write_packed(tmp_path / "two", "w4a16", quantization={**own, "config_groups": groups}), None)
    assert coverage(subject) == whole


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize("module", ["mlp.down_proj", "experts.1.up_proj"])
@pytest.mark.parametrize("form", GROUPED)
def test_a_packed_weight_without_its_scale(form, module, engine, tmp_path):
    lost = f"{LAYER}{module}.weight_scale"
    found = findings(write_packed(tmp_path / "packed", form, True, not_towers, (lost,)), engine)
    assert set(found) == {"missing-scale"}
    assert found["missing-scale"].severity == "warning"
    assert found["missing-scale"].subject == f"{LAYER}{module}.weight_packed"
    assert found["missing-scale"].found == "codes without their weight_scale"


@pytest.mark.parametrize("engine", BOTH)
def test_packed_experts_that_the_list_covers(engine, tmp_path):
    quantization = compressed("pack-quantized", "int", ["re:.*experts.*", "re:.*vision.*"])
    found = findings(write_packed(tmp_path / "packed", "w4a16", True, not_towers, (), quantization), engine)
    assert set(found) == {"list-covers-quantized"}


@pytest.mark.parametrize("form", [*GROUPED, "gptq", "awq"])
def test_packed_weights_without_a_configuration(form, tmp_path):
    assert "no-quantization-config" in findings(write_packed(tmp_path / "packed", form, quantization={}), VLLM)


# Sizes of the tower, 32 and 48, are none that other methods quantize.
@pytest.mark.parametrize("engine", BOTH)
def test_towers_that_vllm_quantizes(engine, tmp_path):
    """compressed-tensors is handed to towers of any size: what the list does not name has to be quantized there."""
    quantization = compressed("pack-quantized", "int", ["re:.*embed_vision.*", "re:.*input_proj.*"])
    folder = write_packed(tmp_path / "quantized", "w4a16", quantization=quantization)
    assert not findings(folder, engine)
    lost = f"{PATTERN}.weight_scale"
    folder = write_packed(tmp_path / "lost", "w4a16", without=(lost,), quantization=quantization)
    assert set(findings(folder, engine)) == {"missing-scale"}
    folder = write_packed(tmp_path / "plain", "w4a16", is_packed=not_towers, quantization=quantization)
    assert set(findings(folder, engine)) == {"list-misses"}
    assert set(findings(write_packed(tmp_path / "listed", "w4a16"), engine)) == {"list-covers-quantized"}
    assert "never-quantized" in findings(folder.parent / "quantized", EXLLAMAV3)


@pytest.mark.parametrize("engine", BOTH)
def test_towers_that_vllm_does_not_quantize(engine, tmp_path):
    found = findings(write_packed(tmp_path / "gptq", "gptq"), engine)
    assert found["never-quantized"].severity == "error" and "vision_tower" in found["never-quantized"].subject


@pytest.mark.parametrize(
    ("method", "sizes", "is_quantized"),
    [("compressed-tensors", (32, 48), True), ("compressed_tensors", (32, 48), True), ("torchao", (32, 48), True),
     ("gptq", (32, 48), False), ("gptq", (64, 128), True), ("fp8", (64, 100), False), (["fp8"], (64, 100), False)],
)  # fmt: skip
def test_whose_towers_vllm_quantizes(method, sizes, is_quantized):
    """As `gemma4_mm.py` hands its configuration on; to a tower for sound only where there is one."""
    vision = {"hidden_size": sizes[0], "intermediate_size": sizes[1]}
    config = {"text_config": {}, "vision_config": vision, "quantization_config": {"quant_method": method}}
    sound = "model.audio_tower.layers.0.feed_forward1.ffw_layer_1.linear.weight"
    for name in (f"{PATTERN}.weight", f"{PATTERN}.qweight", "model.embed_vision.embedding_projection.weight_packed"):
        assert stock.is_tower_linear(name, config) is is_quantized
    assert not stock.is_tower_linear(sound, config)
    assert stock.is_tower_linear(sound, {**config, "audio_config": {"a": 1}}) is is_quantized
    for name in ("model.vision_tower.encoder.layers.0.input_layernorm.weight", f"{LAYER}mlp.up_proj.weight"):
        assert not stock.is_tower_linear(name, config)
    assert not stock.is_tower_linear(f"{PATTERN}.weight", {"quantization_config": {"quant_method": method}})


METHODS = [
    ("foo", "unsupported", "error"),
    ("bitsandbytes", "unsupported", "error"),
    (5, "unsupported", "error"),
    (None, "unsupported", "error"),
    ("fbgemm_fp8", "unsupported", "error"),
    ("GPTQ", "not-checked", "note"),
    ("torchao", "not-checked", "note"),
    ("auto-round", "not-checked", "note"),
]


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize(("method", "code", "severity"), METHODS, ids=[str(method) for method, *_ in METHODS])
def test_methods_that_are_not_checked(method, code, severity, engine, tmp_path):
    """What vLLM does not know is an error; of what it knows, that nobody looked at it is said."""
    found = findings(write_packed(tmp_path / "a", "gptq", quantization={"quant_method": method}), engine)[code]
    assert (found.severity, found.subject, found.found) == (severity, "quant_method", str(method))
    assert bool(found.fix) == (severity == "error")
    assert ("--allow-deprecated-quantization" in found.fix) == (method == "fbgemm_fp8")


@pytest.mark.parametrize("engine", BOTH)
def test_methods_that_are_checked(engine, good):
    for name in ("int8-dense", "fp8-channels", "exl3-dense"):
        found = findings(good[name], engine)
        assert "not-checked" not in found
        assert ("unsupported" in found) == (engine == VLLM_STOCK and name == "exl3-dense")
