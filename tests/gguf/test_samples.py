"""Samples in a chat template that does not work."""

import pytest

from gguf_mixed.errors import InputError
from gguf_mixed.samples import cut_samples

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if messages %}a", "TemplateSyntaxError: Unexpected end of template"),
        ("{{ raise_exception('no\n such   role') }}", "TemplateError: no such role$"),
        ("{{ messages[9].content.x }}", "UndefinedError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_broken_template(template, message, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=f"tokenizer: its chat template fails: {message}"):
        cut_samples(tokenizer, "a " * 100, 2, 40)
    assert len(cut_samples(tokenizer, "a " * 100, 2, 40, raw=True)) == 2
