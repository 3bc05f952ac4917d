"""What the small models have never seen: text, chats and pictures to measure them with.

Importable by path, without installing anything:
`importlib.util.spec_from_file_location("held_out", ".../examples/small_gemma4/held_out.py")`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from small_gemma4 import chats, corpus, pictures


def natural_text() -> list[str]:
    """The held-out sections of the Python language reference, about 2,000 characters each."""
    return corpus.held_out_sections()


def conversations(count: int = 256) -> list[list[dict[str, Any]]]:
    """`count` distinct held-out chats without tools, each a list of messages that ends with the right answer."""
    return [chat.messages for chat in chats.held_out_chats(2 * count) if not chat.tools][:count]


def questions_about_pictures(count: int = 64) -> list[pictures.Picture]:
    """`count` pictures in held-out shades with question and answer; one colour at even places, else two halves."""
    stream = pictures.generate(seed=1, held_out=True)
    return [next(stream) for _ in range(count)]
