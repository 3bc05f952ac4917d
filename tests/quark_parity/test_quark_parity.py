"""`gemma4q quantize --scheme quark-int8` beside AMD Quark 0.13, the real one, in an environment of its own.

Where both do the job, they must agree; where Quark does not, its behaviour and ours are shown side by side,
so that a release which changes its mind is noticed. What earlier releases did is not run: amd-quark 0.11
imports `torch.ao.quantization.pt2e`, gone since torch 2.11. By its source it also quantized 1-D
`*layernorm_1.weight` tensors (0.12.post1 looks at the shape).
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from quark_parity.contestants import BYSTANDER, Pair, Quantized, Tensors, occupied, refused, run_ours, run_quark
from safetensors.torch import load_file, save_file
from synthetic import small_config, write_checkpoint
from tolerances import QUARK_CODES_DIFFERING, QUARK_SCALE

from vllm_gemma4q.architecture import Role, is_fused_experts, role_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("random-dense", "random-moe", "trained-dense", "trained-moe")
LAYER = "model.language_model.layers.1."
UP = f"{LAYER}mlp.up_proj.weight"


@pytest.fixture(scope="session")
def quark_python() -> Path:
    """Python of Quark's environment; made when absent, in a minute or two."""
    subprocess.run([sys.executable, ROOT / "environment" / "create.py", "--quark"], check=True)
    return ROOT / ".venv-quark" / "bin" / "python"


def write_source(folder: Path, name: str) -> Path:
    kind, size = name.split("-")
    if kind == "trained":
        return ROOT / "examples" / "small_gemma4" / size
    return write_checkpoint(folder / name, small_config(moe=size == "moe"), shards=2)


@pytest.fixture(scope="module")
def pairs(quark_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Pair]:
    """Every source quantized by both; Quark writes the first one into an occupied folder."""
    folder = tmp_path_factory.mktemp("pairs")
    sources = {name: write_source(folder / "source", name) for name in SOURCES}
    targets = {name: folder / "quark" / name for name in SOURCES}
    occupied(targets[SOURCES[0]])
    result = run_quark(quark_python, *(path for name in SOURCES for path in (sources[name], targets[name])))
    assert result.returncode == 0, result.stderr[-3000:]
    made = {}
    for name in SOURCES:
        ours = folder / "ours" / name
        result = run_ours(sources[name], ours)
        assert result.returncode == 0, result.stderr
        made[name] = Pair(Quantized(sources[name]), Quantized(ours), Quantized(targets[name]))
    return made


@pytest.fixture(params=SOURCES)
def pair(request: pytest.FixtureRequest, pairs: Mapping[str, Pair]) -> Pair:
    return pairs[request.param]


def assert_same_codes(ours: Tensors, theirs: Tensors) -> None:
    """Codes at most one apart, and that on few elements; scales equal to rounding."""
    names = [name for name, tensor in theirs.items() if tensor.dtype == torch.int8]
    assert names
    differing = total = 0
    for name in names:
        distance = (ours[name].int() - theirs[name].int()).abs()
        assert int(distance.max()) <= 1, name
        differing += int(distance.count_nonzero())
        total += distance.numel()
        scale, expected = ours[f"{name}_scale"], theirs[f"{name}_scale"]
        assert scale.shape == expected.shape == (theirs[name].shape[0],)
        torch.testing.assert_close(scale.float(), expected.float(), rtol=QUARK_SCALE, atol=0, msg=name)
    assert differing / total < QUARK_CODES_DIFFERING


def test_same_tensors_are_quantized(pair: Pair) -> None:
    assert pair.ours.int8 == pair.quark.int8
    assert set(pair.ours.tensors) == set(pair.quark.tensors)
    experts = {name for name in pair.ours.int8 if role_of(name) == Role.EXPERTS}
    text = pair.source.config["text_config"]
    assert len(experts) == 3 * (text.get("num_experts") or 0) * text["num_hidden_layers"]


def test_same_codes_and_scales(pair: Pair) -> None:
    assert_same_codes(pair.ours.tensors, pair.quark.tensors)


def test_everything_else_is_the_same_bit_for_bit(pair: Pair) -> None:
    kept = set(pair.quark.tensors) - {f"{name}{suffix}" for name in pair.quark.int8 for suffix in ("", "_scale")}
    assert kept
    for name in kept:
        ours, theirs = pair.ours.tensors[name], pair.quark.tensors[name]
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name


@pytest.mark.parametrize("damage", ["scale x1.1", "two codes off", "one code off on a hundredth", "expert order"])
def test_comparison_notices(pairs: Mapping[str, Pair], damage: str) -> None:
    pair = pairs["random-moe"]
    tensors = dict(pair.ours.tensors)
    expert = f"{LAYER}experts.0.up_proj.weight"
    if damage == "scale x1.1":
        tensors[f"{UP}_scale"] = tensors[f"{UP}_scale"] * 1.1
    elif damage == "two codes off":
        codes = tensors[UP].clone()
        codes[0, 0] += -2 if codes[0, 0] > 0 else 2
        tensors[UP] = codes
    elif damage == "one code off on a hundredth":
        for name in pair.ours.int8:
            codes = tensors[name].flatten().clone()
            codes[::100] += torch.where(codes[::100] > 0, -1, 1).to(torch.int8)
            tensors[name] = codes.view_as(tensors[name])
    else:
        tensors[expert] = tensors[expert.replace(".0.", ".1.")]
    with pytest.raises(AssertionError):
        assert_same_codes(tensors, pair.quark.tensors)


def test_same_quantization_config(pair: Pair) -> None:
    """Every field that we write, fields within fields included, but for two that differ on purpose."""
    ours, theirs = dict(pair.ours.quantization), dict(pair.quark.quantization)
    ours.pop("exclude"), theirs.pop("exclude")
    export, their_export = dict(ours.pop("export")), dict(theirs.pop("export"))
    # "order" is the published card's word; vLLM looks at it for int4 only.
    assert (export.pop("pack_method"), their_export.pop("pack_method")) == ("order", "reorder")
    assert export == their_export
    layer, their_layer = ours.pop("global_quant_config"), theirs.pop("global_quant_config")
    for side in ("weight", "input_tensors"):
        spec, their_spec = layer.pop(side), their_layer.pop(side)
        assert spec == {key: their_spec[key] for key in spec}
        unset = {key: value for key, value in their_spec.items() if key not in spec}
        assert unset == {
            "block_size": None, "zero_point_type": "int32", "enable_buffer_reuse": False, "max_input_numel": 4194304,
        }  # fmt: skip
    assert layer == their_layer
    assert ours == theirs


def test_rest_of_the_configuration_is_kept_by_both(pair: Pair) -> None:
    for config in (dict(pair.ours.config), dict(pair.quark.config)):
        config.pop("quantization_config")
        assert config == pair.source.config


def test_exclude_lists_what_quark_forgets(pair: Pair) -> None:
    """Quark passes over names that contain `embed` before it looks at `exclude`: unquantized, and not listed."""
    ours, theirs = set(pair.ours.quantization["exclude"]), set(pair.quark.quantization["exclude"])
    forgotten = {"model.embed_vision.embedding_projection", "model.vision_tower.patch_embedder.input_proj"}
    assert all(pair.quark.tensors[f"{name}.weight"].dtype == torch.bfloat16 for name in forgotten)
    # `lm_head` is tied and has no tensor: an engine asks about its module all the same.
    assert ours - theirs == forgotten | {"lm_head"}
    assert theirs < ours


def test_layer_norms_stay_as_they_are_in_both(pair: Pair) -> None:
    """MoE layers have norms whose names do not end in `norm`: releases before 0.12 made INT8 of them."""
    norms = [name for name in pair.source.tensors if role_of(name) == Role.NORM and not name.endswith("layer_scalar")]
    numbered = [name for name in norms if name.endswith(("_1.weight", "_2.weight"))]
    assert bool(numbered) == bool(pair.source.config["text_config"].get("num_experts"))
    for name in norms:
        assert torch.equal(pair.ours.tensors[name], pair.source.tensors[name])
        assert torch.equal(pair.quark.tensors[name], pair.source.tensors[name])
        assert name.removesuffix(".weight") not in pair.ours.quantization["exclude"]
        assert name.removesuffix(".weight") not in pair.quark.quantization["exclude"]


def test_occupied_output_folder(pairs: Mapping[str, Pair], tmp_path: Path) -> None:
    """Quark deletes the folder and what was in it; ours refuses and touches nothing."""
    name = SOURCES[0]
    assert (pairs[name].quark.folder / "config.json").exists()
    assert not (pairs[name].quark.folder / BYSTANDER).exists()
    target = occupied(tmp_path / "target")
    result = run_ours(pairs[name].source.folder, target)
    assert result.returncode == 2
    assert "not empty" in result.stderr
    assert [path.name for path in target.iterdir()] == [BYSTANDER]
    assert (target / BYSTANDER).read_text() == "mine"


def test_plain_quark_leaves_fused_experts_in_bf16_and_says_nothing(
    quark_python: Path, pairs: Mapping[str, Pair], tmp_path: Path
) -> None:
    """Without the template's converters. An engine that trusts the configuration reads BF16 as INT8."""
    pair = pairs["random-moe"]
    result = run_quark(quark_python, "--plain", pair.source.folder, tmp_path / "plain")
    assert result.returncode == 0, result.stderr[-3000:]
    plain = Quantized(tmp_path / "plain")
    fused = {name for name in pair.source.tensors if is_fused_experts(name)}
    assert len(fused) == 2 * pair.source.config["text_config"]["num_hidden_layers"]
    assert all(torch.equal(plain.tensors[name], pair.source.tensors[name]) for name in fused)
    assert not [name for name in plain.quantization["exclude"] if "experts" in name]
    assert not [name for name in plain.int8 if role_of(name) == Role.EXPERTS]

    assert not fused & set(pair.ours.tensors)
    per_expert = {name for name in pair.ours.tensors if role_of(name) == Role.EXPERTS and name.endswith(".weight")}
    assert per_expert <= pair.ours.int8
    assert pair.ours.int8 - per_expert == plain.int8


def test_truncated_shard_costs_quark_the_earlier_output(quark_python: Path, tmp_path: Path) -> None:
    """Quark deletes the output folder before it looks at the source; ours reads every header first."""
    source = write_checkpoint(tmp_path / "source", small_config(), shards=2)
    shard = source / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    quark, ours = occupied(tmp_path / "quark"), tmp_path / "ours"
    result = run_quark(quark_python, source, quark)
    assert result.returncode == 1
    assert "Error reading safetensor" in result.stdout + result.stderr
    assert not quark.exists()
    refused(run_ours(source, ours), ours, shard.name, "truncated")


def test_incomplete_and_unfit_sources_that_quark_takes(quark_python: Path, tmp_path: Path) -> None:
    """A shard of the index that is absent, and an infinity: Quark exits 0 with a checkpoint that is no good."""
    absent = write_checkpoint(tmp_path / "absent", small_config(), shards=3)
    shard = absent / "model-00002-of-00003.safetensors"
    lost = set(load_file(shard))
    shard.unlink()
    unfit = write_checkpoint(tmp_path / "unfit", small_config())
    tensors = load_file(unfit / "model.safetensors")
    tensors[UP][17, 3] = float("inf")
    save_file(tensors, unfit / "model.safetensors", metadata={"format": "pt"})

    quark = Quantized(tmp_path / "quark-absent"), Quantized(tmp_path / "quark-unfit")
    result = run_quark(quark_python, absent, quark[0].folder, unfit, quark[1].folder)
    assert result.returncode == 0, result.stderr[-3000:]
    assert UP in lost
    assert not lost & set(quark[0].tensors)
    assert quark[1].tensors[f"{UP}_scale"][17].isinf()

    refused(run_ours(absent, tmp_path / "ours"), tmp_path / "ours", shard.name)
    refused(run_ours(unfit, tmp_path / "ours"), tmp_path / "ours", UP, "infinite", "[17, 3]")
