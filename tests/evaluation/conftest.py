"""What the tests of `gemma4q evaluate gsm8k` share: made-up questions, and the command in this process."""

import json

import pytest
from gsm8k_server import COUNT, write_questions


@pytest.fixture
def files(tmp_path):
    questions = write_questions(tmp_path / "questions.jsonl", COUNT)
    shots = write_questions(tmp_path / "shots.jsonl", 9, first=100)
    return ("--questions", str(questions), "--shots", str(shots))


@pytest.fixture
def gsm8k(monkeypatch, gemma4q):
    """Runs the command, with no result files in the environment: exit code, stdout (parsed with --json), stderr."""
    for name in ("EVAL_BASELINE_JSON", "EVAL_QUANT_JSON", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments):
        code, out, err = gemma4q("evaluate", "gsm8k", *arguments)
        return code, json.loads(out) if out and "--json" in arguments else out, err

    return run
