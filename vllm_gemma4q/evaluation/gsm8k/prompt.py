"""The prompt: each shot is a turn of the user's and one of the assistant's, then the question.

These are the messages of lm-eval 0.4.13 (task gsm8k, version 3, `--apply_chat_template`, whose default is
`fewshot_as_multiturn`): `Question: ..\\nAnswer:`, answered with the dataset's text as it is, calculator annotations
included. lm-eval draws other shots for each question; here all questions share theirs, so that a server with a cache
of prefixes reads them once and a question's score does not depend on which others are asked.
"""

import hashlib
import json
import random
from collections.abc import Sequence

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.gsm8k.questions import Question

Messages = list[dict[str, str]]

# lm-eval's too: models that write on into a next question, or the end marks of other templates as text.
STOP = ("Question:", "</s>", "<|im_end|>")


def choose_shots(
    pool: Sequence[Question], count: int, seed: int | None, questions: Sequence[Question]
) -> list[Question]:
    """The first `count` of the pool, or as many drawn with `seed`.

    Raises:
        InputError: the pool is too small, or a chosen shot is one of the questions.
    """
    if count > len(pool):
        raise InputError(f"--shots: {len(pool)} questions, expected at least {count}")
    chosen = list(pool[:count]) if seed is None else random.Random(seed).sample(list(pool), count)
    asked = {question.question for question in questions}
    for shot in chosen:
        if shot.question in asked:
            raise InputError(f"--shots: also among the questions: {shot.question[:60]!r}, expected a training split")
    return chosen


def build_messages(shots: Sequence[Question], question: str) -> Messages:
    """The chat that asks one question."""
    messages: Messages = []
    for shot in shots:
        messages += [_user(shot.question), {"role": "assistant", "content": shot.answer}]
    return [*messages, _user(question)]


def prompt_digest(shots: Sequence[Question]) -> str:
    """SHA-256 over everything of the messages but the question."""
    return hashlib.sha256(json.dumps(build_messages(shots, "")).encode()).hexdigest()


def _user(question: str) -> dict[str, str]:
    return {"role": "user", "content": f"Question: {question}\nAnswer:"}
