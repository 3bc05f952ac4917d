"""Which tokens are predicted: llama-perplexity's chunks, and answers in the chat template."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.windows import Framing, Window, cut_windows

MODEL = Path(__file__).resolve().parents[2] / "examples" / "small_gemma4" / "dense"
TEXT = "The interpreter reads a line, and then another one. Nothing is lost, since each has a number.\n" * 60


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_raw_is_the_text_in_chunks(tokenizer):
    windows = cut_windows(tokenizer, TEXT, Framing.RAW, 64, None)
    ids = [tokenizer.bos_token_id, *tokenizer.encode(TEXT, add_special_tokens=False)]
    assert len(windows) == len(ids) // 64 > 10
    for number, window in enumerate(windows):
        assert window.tokens == [tokenizer.bos_token_id, *ids[64 * number + 1 : 64 * (number + 1)]]
        assert (window.first, window.last) == (33, 64)  # llama-perplexity: 64 - 1 - 64 // 2 tokens a chunk
        assert window.n_predicted == 31


@pytest.mark.parametrize("context", [48, 65, 256])
def test_chat_predicts_the_answer(tokenizer, context):
    windows = cut_windows(tokenizer, TEXT, Framing.CHAT, context, 3)
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": "@"}], add_generation_prompt=True, tokenize=False
    )
    assert len(windows) == 3
    for window in windows:
        assert context // 2 < len(window.tokens) <= context
        said = tokenizer.decode(window.tokens[window.first : window.last])
        before = tokenizer.decode(window.tokens[: window.first])
        assert said.strip() and said.strip() in TEXT
        assert before.endswith(template.partition("@")[2]) and before.startswith(template.partition("@")[0])
        # What is left is the end of the turn, and at most half of the window is the user's.
        assert len(window.tokens) - window.last <= 3
        assert window.n_predicted >= context // 4


def test_windows_follow_each_other(tokenizer):
    windows = cut_windows(tokenizer, TEXT, Framing.CHAT, 128, None)
    answers = [tokenizer.decode(window.tokens[window.first : window.last]).strip() for window in windows]
    places = [TEXT.find(answer) for answer in answers]
    assert len(windows) > 5 and min(places) >= 0


@pytest.mark.parametrize(
    ("framing", "context", "chunks", "message"),
    [
        (Framing.RAW, 64, 1000, r"text: got \d+ windows of 64 tokens, expected 1000"),
        (Framing.RAW, 100_000, None, r"text: got 0 windows of 100000 tokens, expected at least 1"),
        (Framing.RAW, 2, None, r"--context: got 2, expected at least 3"),
        (Framing.CHAT, 8, None, r"--context: got 8, which leaves no room"),
    ],
)
def test_too_little(tokenizer, framing, context, chunks, message):
    with pytest.raises(InputError, match=message):
        cut_windows(tokenizer, TEXT, framing, context, chunks)


def test_no_chat_template(tokenizer):
    plain = AutoTokenizer.from_pretrained(MODEL)
    plain.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        cut_windows(plain, TEXT, Framing.CHAT, 64, None)


@pytest.mark.parametrize(("first", "last"), [(0, 3), (3, 3), (2, 5)])
def test_a_window_predicts_what_it_has(first, last):
    with pytest.raises(ValueError, match="window of 4 tokens"):
        Window([1, 2, 3, 4], first, last)


def test_a_broken_template(gemma4q, tmp_path):
    """Of any model, so it is told in one line."""
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(MODEL, folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('Conversation roles must alternate') }}")
    text.write_text(TEXT)
    given = ("evaluate", "perplexity", folder, "--text", text, "--engine", "transformers", "--context", 64)
    message = "error: tokenizer: its chat template fails: TemplateError: Conversation roles must alternate\n"
    assert gemma4q(*given) == (2, "", message)
