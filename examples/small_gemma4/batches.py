"""Training batches: token ids with a weight for each predicted token.

A batch is `(inputs, weights)`: `inputs` are keyword arguments of the model with `input_ids` int64 [B, T] (padded on the
right), `weights` float32 [B, T] the loss weight of predicting each token (0 for padding and for the first token).
In chats and questions about pictures the model's own tokens weigh 1 and everything else `PROMPT_WEIGHT`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import Gemma4Processor, GemmaTokenizer

from small_gemma4.chats import Chat
from small_gemma4.pictures import Picture

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
PROMPT_WEIGHT = 0.1
WINDOW = 256


def text_rows(texts: Sequence[str], tokenizer: GemmaTokenizer, length: int) -> torch.Tensor:
    """The texts as consecutive rows of `length` tokens, int64 [N, length], each row starting with <bos>."""
    ids = [token for text in texts for token in tokenizer(text + "\n\n", add_special_tokens=False).input_ids]
    body = length - 1
    rows = torch.tensor(ids[: len(ids) // body * body]).view(-1, body)
    return torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id), rows], 1)


def text_batches(texts: Sequence[str], tokenizer: GemmaTokenizer, rows: int, length: int, seed: int) -> Iterator[Batch]:
    """Endless random crops of the joined texts, [rows, length], the first token of each replaced by <bos>."""
    stream = torch.tensor([token for text in texts for token in tokenizer(text + "\n\n").input_ids])
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(rows, length)
    weights[:, 0] = 0
    while True:
        starts = torch.randint(len(stream) - length, (rows,), generator=generator)
        ids = stream[starts[:, None] + torch.arange(length)]
        ids[:, 0] = tokenizer.bos_token_id
        yield {"input_ids": ids}, weights


def answer_weights(ids: Sequence[int], tokenizer: GemmaTokenizer) -> list[float]:
    """1 for tokens that the model has to say, up to and including what ends its turn; else `PROMPT_WEIGHT`."""
    opening = tokenizer("<|turn>model\n", add_special_tokens=False).input_ids
    resume, stop = tokenizer.etr_token_id, {tokenizer.eot_token_id, tokenizer.str_token_id}
    weights, speaking, in_model_turn = [0.0], False, False
    for index in range(1, len(ids)):
        weights.append(1.0 if speaking else PROMPT_WEIGHT)
        if ids[index] in stop:
            speaking = False
            in_model_turn = in_model_turn and ids[index] == tokenizer.str_token_id
        elif list(ids[max(0, index + 1 - len(opening)) : index + 1]) == opening:
            speaking = in_model_turn = True
        elif ids[index] == resume and in_model_turn:
            speaking = True
    return weights


def encode_chat(chat: Chat, tokenizer: GemmaTokenizer) -> tuple[list[int], list[float]]:
    """Token ids and weights of one whole chat, without the newline that follows the last turn."""
    text = tokenizer.apply_chat_template(chat.messages, tools=chat.tools or None, tokenize=False)
    ids = tokenizer(text.rstrip("\n"), add_special_tokens=False).input_ids
    return ids, answer_weights(ids, tokenizer)


def pad_rows(rows: Sequence[tuple[list[int], list[float]]], pad: int) -> Batch:
    """Stack rows of different lengths, padded on the right with id `pad` and weight 0."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
    weights = torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in rows])
    return {"input_ids": ids}, weights


def chat_batches(stream: Iterator[Chat], tokenizer: GemmaTokenizer, tokens: int, seed: int) -> Iterator[Batch]:
    """Endless batches of at most `tokens` tokens with padding, each of chats of similar length, in random order."""
    rng = random.Random(seed)
    while True:
        window = sorted((encode_chat(next(stream), tokenizer) for _ in range(WINDOW)), key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for row in window:
            if (len(groups[-1]) + 1) * len(row[0]) > tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            yield pad_rows(group, tokenizer.pad_token_id)


def picture_messages(picture: Picture) -> list[dict[str, Any]]:
    """The user's message of a picture and its question."""
    parts = [{"type": "image"}, {"type": "text", "text": picture.question}]
    return [{"role": "user", "content": parts}]


def picture_batch(pictures: Sequence[Picture], processor: Gemma4Processor, answers: bool = True) -> Batch:
    """Pictures through Gemma 4's processor; with `answers` False only prompts, which pad on the left to generate."""
    texts = []
    for picture in pictures:
        messages = picture_messages(picture)
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        texts.append(prompt + f"{picture.answer}<turn|>" if answers else prompt)
    inputs = processor(
        text=texts,
        images=[[picture.image] for picture in pictures],
        return_tensors="pt",
        add_special_tokens=False,
        padding=True,
        padding_side="right" if answers else "left",
    )
    weights = torch.tensor([answer_weights(row, processor.tokenizer) for row in inputs["input_ids"].tolist()])
    placeholder = processor.image_token_id
    hidden = (inputs["input_ids"] == placeholder) | (inputs["attention_mask"] == 0)
    return dict(inputs), weights.masked_fill(hidden, 0.0)


def picture_batches(pictures: Iterator[Picture], processor: Gemma4Processor, rows: int) -> Iterator[Batch]:
    """Endless batches of `rows` pictures with questions and answers."""
    while True:
        yield picture_batch([next(pictures) for _ in range(rows)], processor)
