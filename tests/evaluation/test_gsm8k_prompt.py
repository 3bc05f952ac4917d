"""Question files and prompts: the messages lm-eval would send, and files that are refused with their line."""

import json
from pathlib import Path

import pytest
from gsm8k_server import write_questions

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.gsm8k.prompt import build_messages, choose_shots, prompt_digest
from vllm_gemma4q.evaluation.gsm8k.questions import digest, first, read_questions

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def pool(tmp_path):
    return read_questions(write_questions(tmp_path / "shots.jsonl", 20, first=100))


@pytest.fixture
def questions(tmp_path):
    return read_questions(write_questions(tmp_path / "questions.jsonl", 5))


def test_each_shot_is_a_turn_and_its_answer(pool, questions):
    shots = choose_shots(pool, 8, None, questions)
    messages = build_messages(shots, questions[3].question)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 8 + ["user"]
    assert messages[0]["content"] == "Question: Case 100: three boxes of 100 pens and two pens?\nAnswer:"
    assert messages[1]["content"] == pool[0].answer and "<<3*100=300>>" in pool[0].answer
    assert messages[15]["content"] == pool[7].answer
    assert messages[-1]["content"] == "Question: Case 3: three boxes of 3 pens and two pens?\nAnswer:"


def test_real_questions():
    """All 1,319 questions of the test split after eight of the training split, where the data is."""
    if not (DATA / "gsm8k_test.jsonl").exists():
        questions, pool = build_pool(1319)
    else:
        questions, pool = (read_questions(DATA / f"gsm8k_{name}.jsonl") for name in ("test", "train_200"))
    shots = choose_shots(pool, 8, None, questions)
    assert len(questions) == 1319
    prompts = [build_messages(shots, question.question) for question in questions]
    assert all(prompt[:-1] == prompts[0][:-1] for prompt in prompts)  # one prefix for a server to keep
    assert len({prompt[-1]["content"] for prompt in prompts}) == 1319


def build_pool(count):
    from vllm_gemma4q.evaluation.gsm8k.questions import Question

    made = [Question(f"Case {n}?", f"#### {n}") for n in range(count + 8)]
    return made[:count], made[count:]


def test_seed_draws_other_shots_and_the_same_again(pool, questions):
    drawn = [choose_shots(pool, 8, seed, questions) for seed in (None, 0, 0, 1)]
    assert drawn[1] == drawn[2]
    assert len({prompt_digest(shots) for shots in drawn}) == 3
    assert all(len(set(shots)) == 8 for shots in drawn)


def test_digests_move_with_every_text_and_the_order(questions):
    assert digest(questions) == digest(list(questions))
    assert len({digest(questions), digest(questions[::-1]), digest(questions[:4])}) == 3
    assert prompt_digest(questions) != prompt_digest(questions[::-1])


def test_shots_from_the_questions_are_refused(pool, questions):
    with pytest.raises(InputError, match="--shots: also among the questions: 'Case 0: "):
        choose_shots([questions[0], *pool], 8, None, questions)
    assert choose_shots([*pool, questions[0]], 8, None, questions)  # not chosen


def test_too_few(pool, questions, tmp_path):
    with pytest.raises(InputError, match="--shots: 20 questions, expected at least 21"):
        choose_shots(pool, 21, None, questions)
    with pytest.raises(InputError, match="--limit: got 6, expected at most 5, the questions of .*q.jsonl"):
        first(questions, 6, tmp_path / "q.jsonl")
    assert first(questions, 2, tmp_path) == questions[:2] and first(questions, None, tmp_path) == questions


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2: .*expected a JSON object"),
        ("[1]", "line 2: got list, expected a JSON object"),
        (json.dumps({"question": "a"}), "line 2: key answer: got NoneType, expected a string"),
        (json.dumps({"question": 1, "answer": "#### 1"}), "line 2: key question: got int, expected a string"),
        (json.dumps({"question": "a", "answer": "1"}), "line 2: key answer: no '#### NUMBER'"),
        (json.dumps({"question": "a", "answer": "1 #### "}), "line 2: key answer: no '#### NUMBER'"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, expected):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "a", "answer": "#### 1"}) + "\n" + line + "\n")
    with pytest.raises(InputError, match=r"q\.jsonl: " + expected):
        read_questions(path)


def test_bad_files(tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, expected in (("empty", "no question"), ("binary", "decode"), ("none", "No such file"), ("", "directory")):
        with pytest.raises(InputError, match=expected):
            read_questions(tmp_path / name)
