"""The natural-English part of the corpus: the Python language reference that CPython ships for `help()`.

`corpus.txt.gz` is a snapshot of `pydoc_data.topics` of CPython 3.11.7 (PSF licence, see PSF-LICENSE.txt), so that a
rebuild does not depend on the Python that runs it. Layout: UTF-8 sections of about 2,000 characters, each made of whole
paragraphs, separated by a form feed. A paragraph that occurs in several topics is kept once, so that no held-out
paragraph is also trained on. Every tenth section is held out.

`python examples/small_gemma4/corpus.py OUT.txt.gz` writes such a snapshot from the running Python.
Not done: cleaning of markup; the reference is plain text with ASCII headings.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

SNAPSHOT = Path(__file__).resolve().parent / "corpus.txt.gz"
SEPARATOR = "\f"
SECTION_CHARACTERS = 2000
HELD_OUT_EVERY = 10


def unique_paragraphs(topics: dict[str, str]) -> list[str]:
    """Paragraphs of all topics in order of the topics' names, each distinct paragraph once."""
    seen: set[str] = set()
    kept = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            text = paragraph.strip("\n")
            key = " ".join(text.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(text)
    return kept


def into_sections(paragraphs: list[str], size: int = SECTION_CHARACTERS) -> list[str]:
    """Join consecutive paragraphs into sections of at least `size` characters (the last may be shorter)."""
    result: list[str] = []
    current: list[str] = []
    length = 0
    for paragraph in paragraphs:
        current.append(paragraph)
        length += len(paragraph) + 2
        if length >= size:
            result.append("\n\n".join(current))
            current, length = [], 0
    if current:
        result.append("\n\n".join(current))
    return result


def write_snapshot(path: Path) -> None:
    """Write the running Python's topics as a snapshot; the same topics always give the same bytes."""
    from pydoc_data import topics

    text = SEPARATOR.join(into_sections(unique_paragraphs(topics.topics)))
    path.write_bytes(gzip.compress(text.encode("utf-8"), 9, mtime=0))


def sections(path: Path = SNAPSHOT) -> list[str]:
    """All sections of the snapshot, in order."""
    return gzip.decompress(path.read_bytes()).decode("utf-8").split(SEPARATOR)


def training_sections() -> list[str]:
    """The sections that the tokenizer and the models are trained on."""
    return [text for index, text in enumerate(sections()) if index % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]


def held_out_sections() -> list[str]:
    """The sections that nothing is trained on."""
    return sections()[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]


if __name__ == "__main__":
    write_snapshot(Path(sys.argv[1]))
