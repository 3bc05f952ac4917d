"""Files of questions: a line ends at a line feed, and nowhere else."""

import json

import pytest

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.gsm8k.questions import read_questions


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_python_takes_for_ends_of_lines(end, tmp_path):
    """JSON allows these within a string as they are; datasets have them."""
    asked = [f"One{character}and two?" for character in "\u2028\u2029\u0085"]
    lines = [json.dumps({"question": text, "answer": "#### 3"}, ensure_ascii=False) for text in asked]
    path = tmp_path / "questions.jsonl"
    path.write_bytes((end.join([*lines, ""]) + end).encode())
    assert [question.question for question in read_questions(path)] == asked
    path.write_bytes((end.join([*lines, "{"]) + end).encode())
    with pytest.raises(InputError, match=r"questions.jsonl: line 4: "):
        read_questions(path)
