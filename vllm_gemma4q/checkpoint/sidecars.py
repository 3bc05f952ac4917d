"""The small files beside the weights: tokenizer, processor, chat template, generation configuration."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_gemma4q.checkpoint.reader import CONFIG, INDEX
from vllm_gemma4q.checkpoint.run import MANIFEST

_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt"})
_LICENCES = ("license", "notice", "use_policy")
_WRITTEN_ANEW = frozenset({CONFIG, INDEX, MANIFEST})


def sidecars(folder: Path) -> list[Path]:
    """Files of a checkpoint that a rewritten one needs unchanged: never weights, code or hidden files."""

    def is_sidecar(path: Path) -> bool:
        if path.name in _WRITTEN_ANEW or path.name.startswith(".") or not path.is_file():
            return False
        return path.suffix in _SUFFIXES or path.name.lower().startswith(_LICENCES)

    return sorted(path for path in folder.iterdir() if is_sidecar(path))


def to_json(value: Mapping[str, Any]) -> bytes:
    """JSON as Hugging Face tools write it: two spaces, a final newline, the order of keys kept."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
