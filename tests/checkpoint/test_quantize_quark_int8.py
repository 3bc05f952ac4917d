"""The file-to-file INT8 quantizer: what it writes, what it leaves alone, and how sizes come out."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from synthetic import (
    CONFIG_26B_A4B,
    CONFIG_31B,
    add_left_over,
    shapes,
    small_config,
    write_checkpoint,
    write_header_only,
)

from vllm_gemma4q.architecture import Role, parse_text_architecture, role_of
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.quark_int8 import quantize

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "gemma-4-31b"


def load(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def run(source, target, **options):
    assert convert(quantize.plan(open_checkpoint(source), **options), target, ["test"], lambda _: None)
    return load(target)


def reference(weight):
    """The rule of amd-quark 0.13, written out: scale in bfloat16 for bfloat16 weights, rounding in float32."""
    absmax = weight.abs().amax(dim=-1)
    absmax = absmax if weight.dtype == torch.bfloat16 else absmax.float()
    scale = (absmax / 127.5).clamp_min(2**-23).float()
    return (weight.float() * (1 / scale)[:, None]).round().clamp(-128, 127).to(torch.int8), scale


@pytest.fixture(scope="module", params=["dense", "moe"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder / "source", small_config(moe=request.param == "moe"), shards=2)
    return load(folder / "source"), run(folder / "source", folder / "target"), folder


def test_linears_of_the_language_model_are_quantized(pair):
    before, after, _ = pair
    linears = [
        name for name in before if "language_model" in name and name.endswith("_proj.weight") and "router" not in name
    ]
    assert len(linears) >= 3 * 6
    for name in linears:
        weight, scale = reference(before[name])
        assert torch.equal(after[name], weight)
        assert torch.equal(after[f"{name}_scale"], scale)


def test_fused_experts_become_one_linear_an_expert(pair):
    before, after, _ = pair
    fused = [name for name in before if name.endswith("experts.gate_up_proj")]
    for name in fused:
        prefix = name.removesuffix(".gate_up_proj")
        down = before[f"{prefix}.down_proj"]
        for expert, both in enumerate(before[name]):
            for linear, rows in zip(("gate_proj", "up_proj", "down_proj"), (*both.chunk(2), down[expert]), strict=True):
                weight, scale = reference(rows)
                assert torch.equal(after[f"{prefix}.{expert}.{linear}.weight"], weight)
                assert torch.equal(after[f"{prefix}.{expert}.{linear}.weight_scale"], scale)
        assert name not in after


def test_everything_else_is_copied_bit_for_bit(pair):
    before, after, _ = pair
    kept = [name for name in before if after.get(name) is not None and after[name].dtype != torch.int8]
    for name in kept:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))
    untouched = (Role.ROUTER, Role.EMBEDDING, Role.NORM, Role.VISION, Role.EMBED_VISION)
    assert {name for name in before if role_of(name) in untouched} == set(kept)


def test_configuration_is_what_engines_read(pair):
    before, _, folder = pair
    config = json.loads((folder / "target" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((folder / "source" / "config.json").read_text())
    assert quantization["quant_method"] == "quark"
    assert quantization["export"]["pack_method"] == "order"
    assert quantization["export"]["weight_format"] == "real_quantized"
    exclude = quantization["exclude"]
    assert not [name for name in exclude if "*" in name or name.startswith("re:")]
    assert {f"{name}.weight" for name in exclude} - set(before) == {"lm_head.weight"}
    for needed in ("vision_tower.encoder.layers.0.self_attn.q_proj.linear", "embed_vision.embedding_projection"):
        assert f"model.{needed}" in exclude
    assert ("model.language_model.layers.0.router.proj" in exclude) == ("num_experts" in config["text_config"])


def test_sidecars_travel_and_pickles_do_not(tmp_path):
    source = write_checkpoint(tmp_path / "source", small_config())
    (source / "optimizer.pt").write_bytes(b"\x80\x04.")
    (source / "modeling.py").write_text("raise SystemExit\n")
    (source / "LICENSE").write_text("terms\n")
    run(source, tmp_path / "target")
    kept = {"LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer_config.json"}
    written = {"config.json", "gemma4q-manifest.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "target").iterdir()} == kept | written
    for name in kept:
        assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes()


def test_manifest_hashes_inputs_and_outputs(pair):
    import hashlib

    folder = pair[2]
    manifest = json.loads((folder / "target" / "gemma4q-manifest.json").read_text())
    for side, where in (("source", "source"), ("output", "target")):
        for name, facts in manifest[side].items():
            content = (folder / where / name).read_bytes()
            assert (facts["bytes"], facts["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    listed = set(manifest["output"]) | {"gemma4q-manifest.json"}
    assert listed == {path.name for path in (folder / "target").iterdir()}


def test_shards_and_index(tmp_path):
    source = write_checkpoint(tmp_path / "source", small_config(moe=True))
    whole = run(source, tmp_path / "whole")
    sharded = run(source, tmp_path / "sharded", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert set(whole) == set(sharded) == set(index["weight_map"])
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert len(set(index["weight_map"].values())) > 3
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / "sharded" / shard, "pt") as file:
            assert name in file.keys()  # noqa: SIM118 - not a mapping


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_float_dtypes(tmp_path, dtype):
    source = write_checkpoint(tmp_path / "source", small_config(), dtype=dtype)
    before, after = load(source), run(source, tmp_path / "target")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    weight, scale = reference(before[name])
    assert torch.equal(after[name], weight)
    assert torch.equal(after[f"{name}_scale"], scale)


def test_experts_that_come_one_by_one(tmp_path):
    """A checkpoint whose experts were split before is quantized like one whose experts are fused."""
    from safetensors.torch import save_file

    source = write_checkpoint(tmp_path / "fused", small_config(moe=True))
    fused_result = run(source, tmp_path / "fused-target")
    tensors = load(source)
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
        prefix = name.removesuffix(".gate_up_proj")
        gate_up, down = tensors.pop(name), tensors.pop(f"{prefix}.down_proj")
        for expert, (both, rows) in enumerate(zip(gate_up, down, strict=True)):
            gate, up = both.chunk(2)
            for linear, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", rows)):
                tensors[f"{prefix}.{expert}.{linear}.weight"] = weight.contiguous()
    split = write_checkpoint(tmp_path / "split", small_config(moe=True))
    save_file(tensors, split / "model.safetensors", metadata={"format": "pt"})
    result = run(split, tmp_path / "split-target")
    assert set(result) == set(fused_result)
    assert all(torch.equal(result[name], fused_result[name]) for name in result)


def test_the_real_31b_gives_the_published_size(tmp_path):
    source = write_header_only(tmp_path / "source", CONFIG_31B, shapes(CONFIG_31B).items())
    conversion = quantize.plan(open_checkpoint(source))
    assert conversion.output_bytes == pytest.approx(33.3e9, rel=0.01)
    assert all(shard.n_bytes <= 5e9 for shard in conversion.shards)
    assert parse_text_architecture(CONFIG_31B).parameters() == 30_697_345_340


def test_the_real_26b_a4b(tmp_path):
    source = write_header_only(tmp_path / "source", CONFIG_26B_A4B, shapes(CONFIG_26B_A4B).items())
    conversion = quantize.plan(open_checkpoint(source))
    assert parse_text_architecture(CONFIG_26B_A4B).parameters() == pytest.approx(25.233e9, rel=1e-4)
    assert conversion.summary["experts"]["quantized"] == 30 * 128 * 3 * 704 * 2816
    assert sum(step.transform is not None for step in conversion.steps) > 30 * 128 * 3


def test_shapes_are_those_of_the_real_inventory():
    """The published 31B's tensors, where the inventory lies beside the repository; its count holds anywhere."""
    text = dict(parse_text_architecture(CONFIG_31B).shapes())
    assert len(text) == 832
    assert sum(math.prod(shape) for shape in text.values()) == 30_697_345_340
    if SHARED.is_dir():
        real = json.loads((SHARED / "hf_text_tensors.json").read_text())
        assert {name: list(shape) for name, shape in text.items()} == real


def test_already_quantized_is_refused(pair):
    with pytest.raises(InputError, match="already quantized"):
        quantize.plan(open_checkpoint(pair[2] / "target"))


def test_only_linears_that_the_model_has_are_quantized(tmp_path):
    """And what engines fuse with them."""
    source = write_checkpoint(tmp_path / "source", small_config())
    modules = add_left_over(source)
    before, after = load(source), run(source, tmp_path / "target")
    assert after[f"{modules['shard']}.weight"].dtype == torch.int8
    exclude = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]["exclude"]
    for kind in ("adapter", "layer"):
        name = f"{modules[kind]}.weight"
        assert torch.equal(after[name], before[name]) and f"{name}_scale" not in after
        assert modules[kind] in exclude
    assert modules["shard"] not in exclude


def test_no_quantization_in_so_many_words(tmp_path):
    """A null means that there is none."""
    source = write_checkpoint(tmp_path / "source", small_config() | {"quantization_config": None})
    run(source, tmp_path / "target")
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "quark"
