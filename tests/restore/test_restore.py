"""Checkpoints damaged as the published story tells, and in other ways: found, mended, equal to the base bit for bit."""

import json
import shutil

import pytest
import torch
from damage import (
    change_quantization,
    load,
    quantize_towers,
    read_config,
    same,
    store,
    to_int8,
    towers,
    write_config,
)

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.restore.plan import bytes_to_compare, plan
from vllm_gemma4q.restore.verify import verify

LM = "model.language_model."
LIST = {"fp8": "ignored_layers", "int8": "exclude", "channels": "ignore"}


def planned(quantized, base):
    return plan(open_checkpoint(quantized), open_checkpoint(base))


def restore(quantized, base, target, **options):
    restoration = plan(open_checkpoint(quantized), open_checkpoint(base), **options)
    checked = []

    def check(shards):
        verify(restoration, shards)
        checked.extend(shards)

    assert convert(restoration.conversion, target, ["test"], lambda _: None, check)
    assert checked
    return restoration


@pytest.fixture(params=["fp8", "int8", "channels"])
def form(request, kind):
    if request.param == "channels" and kind == "moe":
        return "fp8"
    return request.param


@pytest.fixture
def damaged(sound, form, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(sound / form, tmp_path / "damaged")


def expect_sound(sound, form, target):
    """The result is what the quantizer wrote in the first place."""
    expected, got = load(sound / form), load(target)
    assert set(got) == set(expected)
    assert all(same(got[name], expected[name]) for name in got)
    assert read_config(target) == read_config(sound / form)


def test_a_sound_checkpoint_needs_nothing(sound, form):
    restoration = planned(sound / form, sound / "base")
    assert not restoration.is_needed
    assert restoration.restored == restoration.renamed == {}
    assert restoration.dropped == restoration.list_added == restoration.list_removed == ()


def test_towers_and_router_quantized_by_mistake(sound, form, damaged, tmp_path):
    tensors = load(damaged)
    names = quantize_towers(tensors, *([to_int8, ()] if form == "int8" else []))
    assert len(names) >= 8
    tensors[f"{LM}layers.0.input_layernorm.weight_scale"] = torch.tensor(1.0)
    tensors["model.vision_tower.encoder.layers.0.self_attn.k_scale"] = torch.tensor(1.0)
    store(damaged, tensors)
    change_quantization(damaged, **{LIST[form]: ["lm_head", "*vision_tower*"]})
    restoration = restore(damaged, sound / "base", tmp_path / "target")
    assert restoration.restored == dict.fromkeys(names, "quantized")
    scales = [name for name in tensors if name.endswith("_scale") and name not in load(sound / form)]
    assert sorted(restoration.dropped) == sorted(scales)
    assert restoration.list_removed == ("*vision_tower*",)
    assert {name.removesuffix(".weight") for name in names} <= set(restoration.list_added)
    expect_sound(sound, form, tmp_path / "target")


def test_norms_and_embeddings(sound, form, damaged, tmp_path):
    tensors = load(damaged)
    norm, embedding = f"{LM}layers.1.post_attention_layernorm.weight", f"{LM}embed_tokens.weight"
    table, other = "model.vision_tower.patch_embedder.position_embedding_table", f"{LM}norm.weight"
    tensors[norm], tensors[norm.replace("weight", "weight_scale")] = to_int8(tensors[norm])
    tensors[embedding], tensors[embedding.replace("weight", "weight_scale")] = to_int8(tensors[embedding])
    tensors[other] = tensors[other].float()
    tensors[table].view(-1)[-1] += 1
    del tensors[f"{LM}layers.0.layer_scalar"]
    store(damaged, tensors)
    restoration = restore(damaged, sound / "base", tmp_path / "target")
    assert restoration.restored == {
        norm: "quantized",
        embedding: "quantized",
        table: "different",
        other: "different",
        f"{LM}layers.0.layer_scalar": "missing",
    }
    expect_sound(sound, form, tmp_path / "target")


def test_a_whole_tower_that_is_missing(sound, form, damaged, tmp_path):
    tensors = load(damaged)
    kept = {name: tensor for name, tensor in tensors.items() if "vision" not in name}
    store(damaged, kept)
    restoration = restore(damaged, sound / "base", tmp_path / "target")
    assert set(restoration.restored.values()) == {"missing"}
    assert set(restoration.restored) == set(tensors) - set(kept)
    expect_sound(sound, form, tmp_path / "target")


@pytest.mark.parametrize("root", ["model.", "language_model.model.", "model.language_model.model.", ""])
def test_other_roots(sound, form, damaged, tmp_path, root):
    tensors = load(damaged)
    quantize_towers(tensors, *([to_int8, ()] if form == "int8" else []))
    renamed = {
        (root + name.removeprefix(LM) if name.startswith(LM) else name.removeprefix("model.")): tensor
        for name, tensor in tensors.items()
    }
    store(damaged, renamed)
    restoration = restore(damaged, sound / "base", tmp_path / "target")
    assert set(restoration.restored) == set(towers(load(sound / "base")))
    quantized = f"{root}layers.0.mlp.up_proj.weight"
    assert restoration.renamed[quantized] == f"{LM}layers.0.mlp.up_proj.weight"
    expect_sound(sound, form, tmp_path / "target")


def test_lists_in_other_words(sound, form, damaged, tmp_path):
    change_quantization(damaged, **{LIST[form]: ["re:.*vision.*", "language_model.model.layers.0.router.proj"]})
    restoration = restore(damaged, sound / "base", tmp_path / "target")
    assert restoration.restored == {} and restoration.dropped == ()
    assert restoration.list_removed == ("re:.*vision.*", "language_model.model.layers.0.router.proj")
    expect_sound(sound, form, tmp_path / "target")


def test_linears_that_are_not_quantized_are_listed(sound, form, damaged, kind, tmp_path):
    """The last layer's attention and experts in BF16: virtual v_proj, and the experts under one name."""
    base, tensors = load(sound / "base"), load(damaged)
    layer = f"{LM}layers.2."
    for name in [name for name in tensors if name.startswith((f"{layer}self_attn", f"{layer}experts"))]:
        del tensors[name]
    tensors |= {name: one for name, one in base.items() if name.startswith((f"{layer}self_attn", f"{layer}experts"))}
    tensors[f"{layer}self_attn.q_proj.weight_scale"] = torch.tensor(1.0)
    store(damaged, tensors)
    restoration = restore(damaged, sound / "base", tmp_path / "target")
    expected = [f"{layer}self_attn.{shard}_proj" for shard in "kqov"] + [f"{layer}experts"] * (kind == "moe")
    assert sorted(restoration.list_added) == sorted(expected)
    assert restoration.dropped == (f"{layer}self_attn.q_proj.weight_scale",)
    got = load(tmp_path / "target")
    assert set(got) == set(tensors) - set(restoration.dropped)
    assert all(same(got[name], tensors[name]) for name in got)


def test_unquantized_linears_that_differ(sound, form, damaged, tmp_path):
    base, tensors = load(sound / "base"), load(damaged)
    name = f"{LM}layers.0.mlp.down_proj"
    for key in [key for key in tensors if key.startswith(f"{name}.")]:
        del tensors[key]
    tensors[f"{name}.weight"] = base[f"{name}.weight"] * 1.5
    store(damaged, tensors)
    restoration = restore(damaged, sound / "base", tmp_path / "target")
    assert restoration.restored == {f"{name}.weight": "different"}
    assert same(load(tmp_path / "target")[f"{name}.weight"], base[f"{name}.weight"])


def test_a_base_in_one_file_and_many_shards_out(sound, form, damaged, tmp_path):
    tensors = load(damaged)
    quantize_towers(tensors, *([to_int8, ()] if form == "int8" else []))
    store(damaged, tensors)
    base = shutil.copytree(sound / "base", tmp_path / "base")
    store(base, load(base))
    restore(damaged, base, tmp_path / "target", max_shard_bytes=40_000)
    assert len(list((tmp_path / "target").glob("*.safetensors"))) > 3
    expect_sound(sound, form, tmp_path / "target")


def test_extra_tensors_are_dropped(sound, form, damaged, tmp_path):
    tensors = load(damaged)
    tensors["lm_head.weight"] = tensors[f"{LM}embed_tokens.weight"].clone()
    tensors["model.training_step"] = torch.tensor(7)
    store(damaged, tensors)
    config = read_config(damaged)
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    write_config(damaged, config)
    restoration = restore(damaged, sound / "base", tmp_path / "target")
    assert sorted(restoration.dropped) == ["lm_head.weight", "model.training_step"]
    expect_sound(sound, form, tmp_path / "target")


def test_cache_scales_of_quantized_attention_stay(sound, form, damaged, tmp_path):
    tensors = load(damaged)
    quantize_towers(tensors, *([to_int8, ()] if form == "int8" else []))
    scales = [f"{LM}layers.0.self_attn.k_scale", f"{LM}layers.0.self_attn.k_proj.k_scale"]
    tensors |= {name: torch.tensor(0.5) for name in scales}
    store(damaged, tensors)
    restoration = restore(damaged, sound / "base", tmp_path / "target")
    assert not set(scales) & set(restoration.dropped)
    assert set(scales) <= set(load(tmp_path / "target"))


def test_progress_counts_what_is_compared(sound, form):
    seen = []
    quantized, base = open_checkpoint(sound / form), open_checkpoint(sound / "base")
    plan(quantized, base, seen.append)
    assert 0 < sum(seen) <= bytes_to_compare(quantized, base)


def test_the_manifest_names_what_was_done(sound, form, damaged, tmp_path):
    tensors = load(damaged)
    names = quantize_towers(tensors, *([to_int8, ()] if form == "int8" else []))
    store(damaged, tensors)
    restoration = restore(damaged, sound / "base", tmp_path / "target")
    manifest = json.loads((tmp_path / "target" / "gemma4q-manifest.json").read_text())
    assert set(manifest["details"]["restored"]) == set(names)
    assert manifest["details"]["dropped"] == list(restoration.dropped)
    assert set(manifest["identity"]["base"]) == {path.name for path in (sound / "base").glob("*.safetensors")}
