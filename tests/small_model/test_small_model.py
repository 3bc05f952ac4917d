"""The committed small checkpoints: traits from headers, recomputed losses, reproducible builds, right answers."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_gemma4 import corpus as corpus_module
from small_gemma4 import held_out
from tolerances import SMALL_MODEL_LOSS
from torch.nn import functional

EXAMPLE = Path(held_out.__file__).parent
KINDS = ("dense", "moe")
LENGTH = 192
LANGUAGE = "model.language_model."


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def network(kind: str):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(EXAMPLE / kind, dtype=torch.float32).eval()


def tensors(kind: str) -> dict[str, tuple[str, list[int]]]:
    """Name -> (dtype, shape) of every tensor, from the headers of all shards."""
    found = {}
    for path in sorted((EXAMPLE / kind).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = file.keys()
            for name in names:
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
    return found


def config(kind: str) -> dict:
    return json.loads((EXAMPLE / kind / "config.json").read_text())


def training(kind: str) -> dict:
    return json.loads((EXAMPLE / kind / "training.json").read_text())


def values(kind: str, suffix: str) -> list[torch.Tensor]:
    """All tensors whose name ends with `suffix`."""
    found = []
    for path in sorted((EXAMPLE / kind).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = file.keys()
            found += [file.get_tensor(name) for name in names if name.endswith(suffix)]
    return found


def test_every_tensor_is_bf16_and_the_head_is_tied(kind: str) -> None:
    found = tensors(kind)
    assert {dtype for dtype, _ in found.values()} == {"BF16"}
    assert not [name for name in found if "lm_head" in name]
    assert config(kind)["tie_word_embeddings"] is True
    assert config(kind)["architectures"] == ["Gemma4ForConditionalGeneration"]


def test_global_layers_have_no_v_proj_and_other_sizes(kind: str) -> None:
    found, text = tensors(kind), config(kind)["text_config"]
    assert text["attention_k_eq_v"] is True and text["layer_types"][-1] == "full_attention"
    assert {"sliding_attention", "full_attention"} == set(text["layer_types"])
    for layer, layer_type in enumerate(text["layer_types"]):
        prefix = f"{LANGUAGE}layers.{layer}.self_attn."
        is_global = layer_type == "full_attention"
        head_dim = text["global_head_dim" if is_global else "head_dim"]
        kv_heads = text["num_global_key_value_heads" if is_global else "num_key_value_heads"]
        assert (prefix + "v_proj.weight" in found) is not is_global
        assert found[prefix + "q_proj.weight"][1] == [text["num_attention_heads"] * head_dim, text["hidden_size"]]
        assert found[prefix + "k_proj.weight"][1] == [kv_heads * head_dim, text["hidden_size"]]
        assert found[prefix + "q_norm.weight"][1] == [head_dim]
    assert text["global_head_dim"] != text["head_dim"]
    assert text["num_global_key_value_heads"] != text["num_key_value_heads"]


def test_soft_cap_layer_scalars_and_no_per_layer_inputs(kind: str) -> None:
    text = config(kind)["text_config"]
    assert text["final_logit_softcapping"] == 30.0
    assert text["hidden_size_per_layer_input"] == 0
    assert not [name for name in tensors(kind) if "per_layer_input" in name or "embed_tokens_per_layer" in name]
    scalars = values(kind, "layer_scalar")
    assert len(scalars) == text["num_hidden_layers"] and all(scalar.item() != 1 for scalar in scalars)


def test_everything_divides_by_two_ranks(kind: str) -> None:
    text = config(kind)["text_config"]
    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"]
    sizes += ["num_experts", "moe_intermediate_size"] if kind == "moe" else []
    assert all(text[size] % 2 == 0 for size in sizes)


def test_experts_are_fused_beside_a_dense_mlp() -> None:
    found, text = tensors("moe"), config("moe")["text_config"]
    experts, hidden, inner = text["num_experts"], text["hidden_size"], text["moe_intermediate_size"]
    for layer in range(text["num_hidden_layers"]):
        prefix = f"{LANGUAGE}layers.{layer}."
        assert found[prefix + "experts.gate_up_proj"][1] == [experts, 2 * inner, hidden]
        assert found[prefix + "experts.down_proj"][1] == [experts, hidden, inner]
        assert found[prefix + "router.proj.weight"][1] == [experts, hidden]
        assert found[prefix + "mlp.gate_proj.weight"][1] == [text["intermediate_size"], hidden]
    assert inner % 256 and text["intermediate_size"] % 256 and hidden % 256 == 0
    for suffix in ("router.scale", "router.per_expert_scale"):
        scales = values("moe", suffix)
        assert len(scales) == text["num_hidden_layers"] and all(scale.unique().numel() > 4 for scale in scales)


def test_dense_has_no_experts() -> None:
    assert not [name for name in tensors("dense") if "experts" in name or "router" in name]
    assert config("dense")["text_config"]["num_experts"] is None


def test_vision_towers_cover_both_cases_of_the_multiple_of_64_rule() -> None:
    sizes = {kind: config(kind)["vision_config"] for kind in KINDS}
    assert sizes["dense"]["intermediate_size"] % 64 != 0
    assert sizes["moe"]["hidden_size"] % 64 == 0 and sizes["moe"]["intermediate_size"] % 64 == 0
    for kind in KINDS:
        found, vision = tensors(kind), sizes[kind]
        name = "model.vision_tower.encoder.layers.0.mlp.down_proj.linear.weight"
        assert found[name][1] == [vision["hidden_size"], vision["intermediate_size"]]
        assert {"model.vision_tower.std_bias", "model.vision_tower.std_scale"} <= found.keys()
        assert "model.embed_vision.embedding_projection.weight" in found


def test_moe_is_sharded_and_its_index_is_exact() -> None:
    index = json.loads((EXAMPLE / "moe" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, shard in index["weight_map"].items():
        with safe_open(EXAMPLE / "moe" / shard, "pt") as file:
            assert file.get_slice(name).get_dtype() == "BF16"
    assert index["weight_map"].keys() == tensors("moe").keys()
    assert [path.name for path in (EXAMPLE / "dense").glob("*.safetensors")] == ["model.safetensors"]


def rows(tokenizer, texts: list[str]) -> torch.Tensor:
    """The texts as rows of LENGTH tokens that start with <bos>, int64 [N, LENGTH]."""
    ids = [token for text in texts for token in tokenizer(text + "\n\n", add_special_tokens=False).input_ids]
    whole = len(ids) // (LENGTH - 1)
    body = torch.tensor(ids[: whole * (LENGTH - 1)]).view(whole, LENGTH - 1)
    return torch.cat([torch.full((whole, 1), tokenizer.bos_token_id), body], 1)


@torch.no_grad()
def text_loss(network, ids: torch.Tensor) -> float:
    """Mean loss in nats a token over all rows."""
    losses = [
        functional.cross_entropy(network(input_ids=part).logits[:, :-1].flatten(0, 1), part[:, 1:].flatten()).item()
        * len(part)
        for part in ids.split(16)
    ]
    return sum(losses) / len(ids)


def test_stored_text_loss_is_what_transformers_computes(kind: str, network, tokenizer) -> None:
    stored, ids = training(kind)["held_out_loss"]["text"], rows(tokenizer, held_out.natural_text())
    assert abs(text_loss(network, ids) - stored) < SMALL_MODEL_LOSS
    norm = network.model.language_model.layers[0].post_attention_layernorm.weight
    with torch.no_grad():
        norm.mul_(1.1)
        try:
            assert abs(text_loss(network, ids) - stored) > SMALL_MODEL_LOSS
        finally:
            norm.div_(1.1)


def test_text_loss_is_far_below_a_unigram_models(kind: str, tokenizer) -> None:
    trained_on = rows(tokenizer, corpus_module.training_sections())[:, 1:].flatten().tolist()
    counts, size = Counter(trained_on), config(kind)["text_config"]["vocab_size"]
    held = rows(tokenizer, held_out.natural_text())[:, 1:].flatten().tolist()
    total = len(trained_on) + size
    unigram = -sum(math.log((counts[token] + 1) / total) for token in held) / len(held)
    stored = training(kind)
    assert abs(stored["unigram_loss"]["text"] - unigram) < SMALL_MODEL_LOSS
    assert stored["held_out_loss"]["text"] < 0.65 * unigram
    assert stored["held_out_loss"]["chat"] < 0.15 * stored["unigram_loss"]["chat"]


def test_held_out_text_is_not_trained_on() -> None:
    seen = {paragraph for text in corpus_module.training_sections() for paragraph in text.split("\n\n")}
    for text in held_out.natural_text():
        assert not seen & set(text.split("\n\n"))


def test_routing_is_healthy() -> None:
    experts = config("moe")["text_config"]["num_experts"]
    for layers in zip(*training("moe")["expert_usage"].values(), strict=True):
        used = [max(shares) for shares in zip(*layers, strict=True)]
        assert len(used) == experts and min(used) > 0.2 / experts


def test_answers_are_right(kind: str, network) -> None:
    from small_gemma4 import evaluate
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(EXAMPLE / kind)
    questions = {"What is 2 + 3?": "5", "What is the capital of France?": "Paris", "Spell cat.": "c-a-t"}
    prompts = [[{"role": "user", "content": question}] for question in questions]
    assert evaluate.answer(network, processor, prompts) == list(questions.values())


def test_pictures_are_recognised(kind: str, network) -> None:
    from small_gemma4 import batches, evaluate
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(EXAMPLE / kind)
    shown = held_out.questions_about_pictures(16)[::2]
    inputs, _ = batches.picture_batch(shown, processor, answers=False)
    given = evaluate.generate(network, processor, inputs, 6)
    assert given == [picture.answer for picture in shown]


def test_both_folders_hold_the_same_tokenizer_and_template() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (EXAMPLE / "dense" / name).read_bytes() == (EXAMPLE / "moe" / name).read_bytes()
    assert (EXAMPLE / "chat_template.jinja").read_bytes() == (EXAMPLE / "dense" / "chat_template.jinja").read_bytes()


def build(kind: str, output: Path, *arguments: str) -> dict[str, bytes]:
    """Run the documented command; returns every file's bytes, without the seconds in training.json."""
    command = [sys.executable, str(EXAMPLE / "build.py"), kind, "--output", str(output), *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)
    files = {path.name: path.read_bytes() for path in sorted((output / kind).iterdir())}
    stored = json.loads(files["training.json"])
    assert stored.pop("seconds") > 0
    return {**files, "training.json": json.dumps(stored).encode()}


@pytest.mark.slow
def test_builds_are_byte_identical(kind: str, tmp_path: Path) -> None:
    """Twice the dense one; of the mixture, trained by the same code, once what does not depend on training."""
    names = ("first", "second")[: 2 if kind == "dense" else 1]
    first, *others = (build(kind, tmp_path / name, "--steps", "2", "--no-evaluation") for name in names)
    assert first.keys() >= {"config.json", "tokenizer.json", "processor_config.json"}
    for other in others:
        assert first.keys() == other.keys()
        assert [name for name in first if first[name] != other[name]] == []
    committed = {path.name for path in (EXAMPLE / kind).iterdir()}
    assert first.keys() == committed
    same = ("config.json", "tokenizer.json", "chat_template.jinja", "processor_config.json", "generation_config.json")
    assert [name for name in same if first[name] != (EXAMPLE / kind / name).read_bytes()] == []


def test_streams_are_reproducible_and_splits_disjoint() -> None:
    from small_gemma4 import chats

    first, again = (list(itertools.islice(chats.generate(5, held_out=False), 400)) for _ in range(2))
    assert first == again
    trained = {repr(chat.messages) for chat in first}
    assert not trained & {repr(chat.messages) for chat in chats.held_out_chats(200)}
