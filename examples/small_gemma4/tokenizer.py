"""A tokenizer built like Gemma's: BPE with byte fallback, spaces written as U+2581, no pre-tokenizer at run time.

Layout of the vocabulary: special tokens (<pad> 0, <eos> 1, <bos> 2, <unk> 3, <mask> 4, then Gemma 4's turn, image,
audio, video, tool and thinking tokens), 256 byte tokens, then the alphabet and the merged pieces.
Training splits text into words, digits and runs of spaces, newlines and punctuation, so that no merge crosses a word;
at run time merges are applied to the whole text, as Gemma's tokenizer does.
Not done: Gemma's unused tokens and its token ids above 5; only the names and their roles are the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from transformers import GemmaTokenizer

VOCABULARY_SIZE = 1024
TEMPLATE = Path(__file__).resolve().parent / "chat_template.jinja"
ROLES = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>", "mask_token": "<mask>"}
NAMED = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
    "escape_token": '<|"|>',
    "think_token": "<|think|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
}
VIDEO_TOKEN = "<|video|>"
SPECIAL = [*ROLES.values(), *NAMED.values(), VIDEO_TOKEN]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
ALPHABET = [chr(code) for code in range(0x21, 0x7F)] + ["\n", "\t", "▁"]
WORDS = Regex(r"▁?\p{L}+|\p{N}|▁?[^▁\n\p{L}\p{N}]+|▁+|\n+")


def learn_merges(texts: list[str], n_pieces: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Learn a BPE of `n_pieces` pieces; returns (pieces by id, merges by rank)."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(WORDS, behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=n_pieces, initial_alphabet=ALPHABET, limit_alphabet=len(ALPHABET), show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [(left, right) for left, right in model["merges"]]


def build(texts: list[str], size: int = VOCABULARY_SIZE) -> GemmaTokenizer:
    """Train on `texts` and return transformers' GemmaTokenizer with the chat template; `size` counts every token."""
    from transformers import GemmaTokenizer

    pieces, merges = learn_merges(texts, size - len(SPECIAL) - len(BYTES))
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *BYTES, *pieces])}
    if len(vocabulary) != size:
        raise ValueError(f"vocabulary: got {len(vocabulary)} tokens, expected {size}")
    tokenizer = GemmaTokenizer(
        vocab=vocabulary,
        merges=merges,
        **ROLES,
        model_specific_special_tokens=NAMED,
        extra_special_tokens=[VIDEO_TOKEN],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return tokenizer
