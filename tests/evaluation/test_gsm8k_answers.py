"""Reading numbers and scoring, against what lm-eval itself says of the same replies."""

from pathlib import Path

import pytest
from gsm8k_server import write_questions

from vllm_gemma4q.evaluation.gsm8k.answers import Outcome, Parse, Reply, extract, normalise, outcome
from vllm_gemma4q.evaluation.gsm8k.questions import read_questions

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

# (reply, dataset's answer, strict: what is read and whether it counts, flexible: the same), from lm-eval 0.4.13:
# the filters and exact_match with the settings of its own tasks/gsm8k/gsm8k.yaml (version 3). The same comparison on
# 1,500 generated replies to real questions found no difference.
LM_EVAL = [
    ("#### 18", "w #### 18", "18", True, "18", True),
    ("#### 18.", "#### 18", "18.", True, "18.", True),
    ("#### $18", "#### 18", "[invalid]", False, "$18", True),
    ("#### 18.00", "#### 18", "18.00", False, "18.00", False),
    ("#### 1,800", "#### 1800", "1,800", True, "1,800", True),
    ("#### 1800", "#### 1,800", "1800", True, "1800", True),
    ("#### -5", "#### -5", "-5", True, "-5", True),
    ("#### - 5", "#### -5", "[invalid]", False, "5", False),
    ("####18", "#### 18", "[invalid]", False, "18", True),
    ("####  18", "#### 18", "[invalid]", False, "18", True),
    ("#### 18\n#### 20", "#### 18", "18", True, "20", False),
    ("#### 18\n#### 20", "#### 20", "18", False, "20", True),
    ("The answer is 18 ...", "#### 18", "[invalid]", False, "...", False),
    ("The answer is $18.", "#### 18", "[invalid]", False, "$18.", True),
    ("The answer is 18 dollars", "#### 18", "[invalid]", False, "18", True),
    ("a,b 7", "#### 7", "[invalid]", False, "7", True),
    ("", "#### 7", "[invalid]", False, "[invalid]", False),
    ("   ", "#### 7", "[invalid]", False, "[invalid]", False),
    ("no number", "#### 7", "[invalid]", False, "[invalid]", False),
    (".", "#### 7", "[invalid]", False, "[invalid]", False),
    ("..", "#### 7", "[invalid]", False, "..", False),
    ("7..", "#### 7", "[invalid]", False, "7..", False),
    ("-$7", "#### -7", "[invalid]", False, "-$7", True),
    ("$-7", "#### -7", "[invalid]", False, "-7", True),
    ("7%", "#### 7", "[invalid]", False, "7", True),
    ("0.5", "#### .5", "[invalid]", False, "0.5", False),
    ("#### 0.5", "#### 0.5", "0.5", True, "0.5", True),
    ("7\xa0", "#### 7", "[invalid]", False, "7", True),
    ("٧", "#### 7", "[invalid]", False, "[invalid]", False),
    ("#### ٧", "#### 7", "[invalid]", False, "[invalid]", False),
    ("**18**", "#### 18", "[invalid]", False, "18", True),
    ("#### **18**", "#### 18", "[invalid]", False, "18", True),
    ("#### 18 eggs. 3 left", "#### 18", "18", True, "3", False),
    ("#### 18\n", "#### 18", "18", True, "18", True),
    ("1e3", "#### 1000", "[invalid]", False, "3", False),
    ("#### 1e3", "#### 1", "1", True, "3", False),
    ("#### .", "#### 7", ".", False, "[invalid]", False),
    ("#### ,", "#### 7", ",", False, "[invalid]", False),
    ("#### 7,", "#### 7", "7,", True, "7,", True),
    ("x 7, 8, and 9,", "#### 9", "[invalid]", False, "9,", True),
    ("5-3", "#### 3", "[invalid]", False, "-3", False),
    ("5 - 3", "#### 3", "[invalid]", False, "3", True),
    ("2,3", "#### 23", "[invalid]", False, "2,3", True),
    ("$", "#### 7", "[invalid]", False, "[invalid]", False),
    ("$$", "#### 7", "[invalid]", False, "$$", False),
    ("18\n\nQuestion", "#### 18", "[invalid]", False, "18", True),
    ("$1,234.50", "#### 1234.50", "[invalid]", False, "$1,234.50", True),
    ("$1,234.50.", "#### 1234.50", "[invalid]", False, "$1,234.50.", True),
    ("####\n18", "#### 18", "[invalid]", False, "18", True),
    ("### 18", "#### 18", "[invalid]", False, "18", True),
    ("##### 18", "#### 18", "18", True, "18", True),
]


@pytest.mark.parametrize(("text", "answer", "strict", "strict_ok", "flexible", "flexible_ok"), LM_EVAL)
def test_as_lm_eval(text, answer, strict, strict_ok, flexible, flexible_ok):
    for parse, number, right in ((Parse.STRICT, strict, strict_ok), (Parse.FLEXIBLE, flexible, flexible_ok)):
        assert (extract(text, parse) or "[invalid]") == number
        assert (outcome(Reply(text, "stop"), normalise(answer), parse) is Outcome.CORRECT) == right


def test_vectors_hold_all_four_verdicts():
    assert {(strict, flexible) for _, _, _, strict, _, flexible in LM_EVAL} == {
        (True, True), (True, False), (False, True), (False, False)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply("#### 18", "stop"), Outcome.CORRECT),
        (Reply("#### 18", "length"), Outcome.CORRECT),  # lm-eval knows of no truncation
        (Reply("#### 19", "length"), Outcome.TRUNCATED),
        (Reply("", "length"), Outcome.TRUNCATED),
        (Reply("#### 19", "stop"), Outcome.WRONG),
        (Reply("no idea", "stop"), Outcome.WRONG),
        (Reply("", "stop"), Outcome.EMPTY),
        (Reply(" \n", "stop"), Outcome.EMPTY),
        (Reply(error="HTTP 500"), Outcome.ERROR),
    ],
)
def test_what_is_no_answer_is_not_a_wrong_one(reply, expected):
    for parse in Parse:
        assert outcome(reply, "18", parse) is expected


@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "gsm8k_train_200.jsonl"])
def test_every_answer_is_right_about_itself(name, tmp_path):
    """The dataset's own solutions, as replies: all of them count, and none does for the next question's number."""
    path = DATA / name
    questions = read_questions(path if path.exists() else write_questions(tmp_path / name, 50))
    for question, following in zip(questions, [*questions[1:], questions[0]], strict=True):
        right, wrong = normalise(question.answer), normalise(following.answer)
        float(right)
        for parse in Parse:
            assert outcome(Reply(question.answer, "stop"), right, parse) is Outcome.CORRECT
            if wrong != right:
                assert outcome(Reply(question.answer, "stop"), wrong, parse) is Outcome.WRONG
