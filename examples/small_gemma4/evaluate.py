"""Measures a model: held-out losses against a unigram model's, right answers, right colours, use of the experts.

Losses are in nats a token. Chat loss counts the model's own tokens only. Answers are greedy, up to 24 new tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Gemma4ForConditionalGeneration, Gemma4Processor, GemmaTokenizer

from small_gemma4 import batches, chats, corpus, pictures
from small_gemma4.train import RouterProbe, weighted_loss

TEXT_LENGTH = 192
CHATS = 320
PICTURES = 96
NEW_TOKENS = 24


def text_batch(tokenizer: GemmaTokenizer) -> batches.Batch:
    """All held-out text as one batch of rows of `TEXT_LENGTH` tokens."""
    ids = batches.text_rows(corpus.held_out_sections(), tokenizer, TEXT_LENGTH)
    weights = torch.ones(ids.shape)
    weights[:, 0] = 0
    return {"input_ids": ids}, weights


def chat_batch(tokenizer: GemmaTokenizer) -> batches.Batch:
    """Held-out chats as one batch in which only the model's own tokens count."""
    rows = [batches.encode_chat(chat, tokenizer) for chat in chats.held_out_chats(CHATS) if not chat.tools]
    inputs, weights = batches.pad_rows(rows, tokenizer.pad_token_id)
    return inputs, weights.floor()


@torch.no_grad()
def loss(model: Gemma4ForConditionalGeneration, batch: batches.Batch) -> float:
    """Mean loss of a large batch, 16 rows at a time."""
    inputs, weights = batch
    total = 0.0
    for ids, part in zip(torch.split(inputs["input_ids"], 16), torch.split(weights, 16), strict=True):
        total += weighted_loss(model, ({"input_ids": ids}, part)).item() * part[:, 1:].sum().item()
    return total / weights[:, 1:].sum().item()


def unigram_loss(training: torch.Tensor, held_out: torch.Tensor, size: int) -> float:
    """Loss of add-one smoothed token frequencies of int64 [N] `training` on int64 [M] `held_out`."""
    counts = torch.bincount(training, minlength=size).double() + 1
    return -(counts / counts.sum()).log()[held_out].mean().item()


def unigram_losses(tokenizer: GemmaTokenizer) -> dict[str, float]:
    """Unigram losses on held-out text and on the model's tokens of held-out chats."""
    texts = batches.text_rows(corpus.training_sections(), tokenizer, TEXT_LENGTH)[:, 1:].flatten()
    text_held = text_batch(tokenizer)[0]["input_ids"][:, 1:].flatten()
    training = [batches.encode_chat(c, tokenizer) for c in itertools.islice(chats.generate(2, held_out=False), 4000)]
    spoken = torch.tensor([token for ids, w in training for token, weight in zip(ids, w, strict=True) if weight == 1])
    inputs, weights = chat_batch(tokenizer)
    size = len(tokenizer)
    return {
        "text": unigram_loss(texts, text_held, size),
        "chat": unigram_loss(spoken, inputs["input_ids"][weights == 1], size),
    }


@torch.no_grad()
def generate(
    model: Gemma4ForConditionalGeneration, processor: Gemma4Processor, inputs: dict[str, Any], new_tokens: int
) -> list[str]:
    """Greedy answers, without special tokens, to a batch of prompts padded on the left."""
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    answers: list[str] = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def answer(
    model: Gemma4ForConditionalGeneration, processor: Gemma4Processor, prompts: Sequence[list[chats.Message]]
) -> list[str]:
    """Greedy answers to chats that end with the user's message, 64 at a time."""
    answers = []
    for start in range(0, len(prompts), 64):
        inputs = processor.tokenizer.apply_chat_template(
            list(prompts[start : start + 64]),
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        answers += generate(model, processor, inputs, NEW_TOKENS)
    return answers


def chat_accuracy(model: Gemma4ForConditionalGeneration, processor: Gemma4Processor) -> dict[str, float]:
    """Share of exactly right last answers by topic, `all`, and `arithmetic_trained` for sums seen in training."""
    tested = [chat for chat in chats.held_out_chats(CHATS) if not chat.tools]
    seen = (chat for chat in chats.generate(3, held_out=False) if chat.topic == "arithmetic")
    tested += itertools.islice(seen, 64)
    answers = answer(model, processor, [chat.messages[:-1] for chat in tested])
    right: dict[str, list[bool]] = {}
    for chat, given in zip(tested, answers, strict=True):
        hit = given == chat.messages[-1]["content"]
        topics = [chat.topic, "all"] if chat.held_out else ["arithmetic_trained"]
        for topic in topics:
            right.setdefault(topic, []).append(hit)
    return {topic: sum(hits) / len(hits) for topic, hits in sorted(right.items())}


def picture_accuracy(model: Gemma4ForConditionalGeneration, processor: Gemma4Processor) -> dict[str, float]:
    """Share of right colours on held-out shades: pictures of one colour and of two halves."""
    shown = list(itertools.islice(pictures.generate(1, held_out=True), PICTURES))
    hits = []
    for start in range(0, PICTURES, 8):
        group = shown[start : start + 8]
        inputs, _ = batches.picture_batch(group, processor, answers=False)
        given = generate(model, processor, inputs, 6)
        hits += [text == picture.answer for text, picture in zip(given, group, strict=True)]
    return {"one_colour": sum(hits[::2]) / len(hits[::2]), "two_halves": sum(hits[1::2]) / len(hits[1::2])}


@torch.no_grad()
def expert_usage(model: Gemma4ForConditionalGeneration, tokenizer: GemmaTokenizer) -> dict[str, list[list[float]]]:
    """Share of the routed tokens of each expert, by layer, on held-out text and on held-out chats; empty if dense."""
    probe = RouterProbe(model)
    usage: dict[str, list[list[float]]] = {}
    for name, (inputs, _) in {"text": text_batch(tokenizer), "chat": chat_batch(tokenizer)}.items():
        real = inputs["input_ids"] != tokenizer.pad_token_id
        model(input_ids=inputs["input_ids"], use_cache=False, logits_to_keep=1)
        layers = []
        for probabilities, choices in probe.take():
            counts = torch.bincount(choices[real.flatten()].flatten(), minlength=probabilities.shape[-1])
            layers.append([round(share, 5) for share in (counts / counts.sum()).tolist()])
        if layers:
            usage[name] = layers
    return usage


def report(model: Gemma4ForConditionalGeneration, processor: Gemma4Processor) -> dict[str, Any]:
    """Everything above as one JSON-serialisable dict; losses and shares are rounded to five places."""
    tokenizer = processor.tokenizer
    losses = {"text": loss(model, text_batch(tokenizer)), "chat": loss(model, chat_batch(tokenizer))}
    return {
        "held_out_loss": {name: round(value, 5) for name, value in losses.items()},
        "unigram_loss": {name: round(value, 5) for name, value in unigram_losses(tokenizer).items()},
        "chat_accuracy": {name: round(value, 5) for name, value in chat_accuracy(model, processor).items()},
        "picture_accuracy": {name: round(value, 5) for name, value in picture_accuracy(model, processor).items()},
        "expert_usage": expert_usage(model, tokenizer),
    }
