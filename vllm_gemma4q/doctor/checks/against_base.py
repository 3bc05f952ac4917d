"""Processor, tokenizer and generation files against those of the checkpoint that it was made from.

Files that both have are compared by their bytes, and where these differ by their JSON: the order of keys and white
space do not matter, nor what savers write about themselves. The chat template is compared by `sidecars.py`.

Not done: files that only one of them has, for one file's part may be another's (`processor_config.json` holds what
`preprocessor_config.json` does). JSON beyond the strict reader's bounds, as tokenizers of 260,000 tokens are, is
compared without white space alone.
"""

import hashlib
import mmap
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_gemma4q.checkpoint.header import read_json
from vllm_gemma4q.doctor.checks.sidecars import KEY
from vllm_gemma4q.doctor.engines import Engine
from vllm_gemma4q.doctor.finding import Finding, Severity, about
from vllm_gemma4q.doctor.subject import Subject
from vllm_gemma4q.errors import InputError, reading

# Each kind's files, and what it means that they are others.
_KINDS = {
    "stale-processor": (
        ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
        "pictures, videos and sounds reach the model otherwise than it learned",
    ),
    "stale-tokenizer": (
        ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        "text reaches the model as other tokens than it learned",
    ),
    "stale-generation-config": (
        ("generation_config.json",),
        "replies end or are sampled otherwise than the model's makers say",
    ),
}
# Written by whatever saves a file, and of no effect; templates are compared as what engines make of all files.
_WITHOUT_EFFECT = frozenset({"transformers_version", "name_or_path", "is_local", "local_files_only", KEY})
# A text, whole up to its end or the file's, or anything else but white space: linear in whatever it is given.
_JSON_PIECE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[^\s"]+', re.DOTALL)


def check(subject: Subject, engine: Engine) -> Iterator[Finding]:
    """Every file that both have and that says something else."""
    if subject.base is None:
        return
    base = subject.base.folder
    for code, (files, reason) in _KINDS.items():
        both = [name for name in files if (subject.folder / name).is_file() and (base / name).is_file()]
        stale = [name for name in both if not _same(subject.folder / name, base / name)]
        originals = " ".join(shlex.quote(str(base / name)) for name in stale)
        fix = f"cp {originals} {subject.path}/"
        yield from about(code, Severity.WARNING, stale, "other content", "BASE's", reason, fix)


def _same(one: Path, other: Path) -> bool:
    if _digest(one) == _digest(other):
        return True
    if one.suffix != ".json":
        return False
    try:
        return _content(one) == _content(other)
    except (InputError, RecursionError):  # no JSON, or none that is read or compared within bounds
        return _digest_of_pieces(one) == _digest_of_pieces(other)


def _content(path: Path) -> dict[str, Any]:
    return {key: value for key, value in read_json(path).items() if key not in _WITHOUT_EFFECT}


def _digest(path: Path) -> bytes:
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _digest_of_pieces(path: Path) -> bytes:
    """Of a file without the white space between its texts and numbers."""
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size:  # nothing cannot be mapped
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                for piece in _JSON_PIECE.finditer(content):
                    digest.update(piece[0])
    return digest.digest()
