"""Questions of GSM8K from JSON lines with the keys `question` and `answer`, as openai/gsm8k has them.

The answer is worked out and ends in `#### NUMBER`. Nothing here downloads a dataset.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf_mixed import strict_json
from vllm_gemma4q.errors import InputError

_MARK = "#### "
HOW_TO_GET = (
    'nothing is downloaded silently; get both with python -c "from datasets import load_dataset; '
    "[load_dataset('openai/gsm8k', 'main', split=s).to_json(f'gsm8k_{s}.jsonl') for s in ('test', 'train')]\" "
    "and give --questions gsm8k_test.jsonl --shots gsm8k_train.jsonl"
)


@dataclass(frozen=True)
class Question:
    """A word problem and its worked-out answer, both as in the file."""

    question: str
    answer: str


def read_questions(path: Path) -> list[Question]:
    """All questions of a file, in its order.

    Raises:
        InputError: no such file, no question in it, or a line that is none; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines knows ends that JSON has within strings
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}, expected JSON lines of GSM8K") from error
    found = [_parse(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{path}: no question, expected JSON lines of GSM8K")
    return found


def first(questions: Sequence[Question], limit: int | None, path: Path) -> list[Question]:
    """The first `limit`, or all. Raises InputError: there are fewer."""
    if limit is not None and limit > len(questions):
        raise InputError(f"--limit: got {limit:,}, expected at most {len(questions):,}, the questions of {path}")
    return list(questions[:limit])


def digest(questions: Sequence[Question]) -> str:
    """SHA-256 that moves with any text of the questions and answers, and with their order."""
    texts = [[question.question, question.answer] for question in questions]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _parse(line: str, where: str) -> Question:
    try:
        value = strict_json.parse(line.encode())
    except ValueError as error:
        raise InputError(f"{where}: {error}, expected a JSON object") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: got {type(value).__name__}, expected a JSON object")
    for key in ("question", "answer"):
        if not isinstance(value.get(key), str):
            raise InputError(f"{where}: key {key}: got {type(value.get(key)).__name__}, expected a string")
    if not value["answer"].rpartition(_MARK)[2].strip() or _MARK not in value["answer"]:
        raise InputError(f"{where}: key answer: no '{_MARK}NUMBER', expected at its end")
    return Question(value["question"], value["answer"])
