"""Texts of four classes for `pruning.py`: a manual, chats about numbers, about words and facts, and over some turns."""

import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from small_gemma4 import chats, corpus  # noqa: E402

MODEL = ROOT / "examples" / "small_gemma4" / "moe"
TOPICS = {
    "numbers": {"arithmetic", "comparison", "counting"},
    "knowledge": {"words", "facts", "system", "calendar"},
    "turns": {"recall"},
}
CHATS = {True: 2000, False: 7500}  # drawn, held out or not; fewer are distinct
TOKENS = {True: 1200, False: 3600}  # of each class of chats: of one, no more are held out
SECTIONS_APART = 25


def chat_text(chat: chats.Chat) -> str:
    return "\n".join(message["content"] for message in chat.messages)


def distinct_chats(held_out: bool, draw: int = 0) -> dict[str, list[chats.Chat]]:
    """By class, the chats of one split that differ; another draw gives others."""
    found: dict[str, dict[str, chats.Chat]] = {name: {} for name in TOPICS}
    for chat in islice(chats.generate(2 + draw, held_out), CHATS[held_out]):
        for name, topics in TOPICS.items():
            if chat.topic in topics:
                found[name][repr(chat.messages)] = chat
    return {name: list(group.values()) for name, group in found.items()}


def write_texts(
    folder: Path, sections: Sequence[str], groups: Mapping[str, Sequence[chats.Chat]], tokens: int
) -> list[Path]:
    """One file a class: so many tokens of each kind of chats, and of the manual, the first, as many as of all chats."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = {"manual": "\n\n".join(sections)}
    texts |= {name: "\n\n".join(map(chat_text, group)) for name, group in groups.items()}
    folder.mkdir()
    for name, text in texts.items():
        ids, size = tokenizer.encode(text, add_special_tokens=False), tokens * (1 if name in groups else len(groups))
        assert len(ids) >= size, (name, len(ids))
        (folder / f"{name}.txt").write_text(tokenizer.decode(ids[:size]), encoding="utf-8")
    return [folder / f"{name}.txt" for name in texts]


def training_sections(draw: int) -> list[str]:
    """The manual's, beginning elsewhere in every draw."""
    sections = corpus.training_sections()
    start = draw * SECTIONS_APART
    return [*sections[start:], *sections[:start]]
