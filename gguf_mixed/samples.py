"""Samples of text for statistics: token ids cut from files, framed as the model is used.

A model that was tuned for chat answers raw text with noise, and what is measured there says little of its use. So the
text is put into the model's own chat template, half of it as what the user says and half as the answer; models
without a template, or `raw=True`, get the plain text after the first token.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gguf_mixed.errors import InputError

_FEWEST_TOKENS = 16


def read_texts(paths: Sequence[Path]) -> str:
    """Content of the files, one after the other.

    Raises:
        InputError: one cannot be read, is not UTF-8, or is empty.
    """
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path.name}: cannot be read as text: {error}") from error
        if not texts[-1].strip():
            raise InputError(f"{path.name}: holds no text")
    return "\n\n".join(texts)


def cut_samples(tokenizer: Any, text: str, n_samples: int, length: int, raw: bool = False) -> list[list[int]]:
    """`n_samples` lists of at most `length` token ids, spread evenly over the text.

    Raises:
        InputError: the text has too few tokens, `length` leaves none for it, or the chat template is broken.
    """
    framed = is_framed(tokenizer, raw)
    room = length - (len(_frame(tokenizer, [], [])) if framed else 1)
    if room < _FEWEST_TOKENS:
        raise InputError(f"length: got {length} tokens, of which {room} are left for text, expected {_FEWEST_TOKENS}")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < n_samples * room:
        raise InputError(
            f"text: got {len(ids):,} tokens, expected {n_samples * room:,} for {n_samples} samples of {length}: "
            "more text, or fewer or shorter samples"
        )
    starts = np.linspace(0, len(ids) - room, n_samples).astype(int)
    pieces = [ids[start : start + room] for start in starts]
    if framed:
        return [_frame(tokenizer, piece[: room // 2], piece[room // 2 :])[:length] for piece in pieces]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [[*first, *piece] for piece in pieces]


def is_framed(tokenizer: Any, raw: bool) -> bool:
    """Whether `cut_samples` uses the chat template."""
    return bool(getattr(tokenizer, "chat_template", None)) and not raw


def in_template(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """A chat as its model's template writes it. Raises InputError: the template is broken."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # Jinja's own errors, and whatever the template's code meets
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"tokenizer: its chat template fails: {reason}") from error


def describe_text(paths: Sequence[Path]) -> list[dict[str, object]]:
    """Names and hashes, for provenance."""
    return [{"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in paths]


def _frame(tokenizer: Any, user: list[int], assistant: list[int]) -> list[int]:
    messages = [
        {"role": "user", "content": tokenizer.decode(user)},
        {"role": "assistant", "content": tokenizer.decode(assistant)},
    ]
    return list(tokenizer.encode(in_template(tokenizer, messages), add_special_tokens=False))
