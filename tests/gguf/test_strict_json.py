"""JSON of files from elsewhere: RFC 8259, within bounds."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_mixed.errors import InputError, one_line
from gguf_mixed.strict_json import parse

NUMBERS = st.integers(-(10**38), 10**38) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(codec="utf-8"))
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=20)


@given(VALUES, st.booleans())
def test_what_is_json_is_read_as_the_standard_library_does(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert parse(text) == json.loads(text)


REFUSED = {
    "NaN": ("[NaN]", "NaN is not a number"),
    "infinity": ('{"a": -Infinity}', "-Infinity is not a number"),
    "too large a float": ("[1e999]", "1e999 is not finite"),
    "too long an integer": ("[" + "9" * 5000 + "]", "an integer of 5000 digits, expected at most 40"),
    "a key twice": ('{"a": {"b": 1, "c": 2, "b": 1}}', "duplicate key 'b'"),
    "half a character": ('["\\ud83d"]', "an escape that is half a character"),
    "half a character as a key": ('{"\\uDE00": 1}', "an escape that is half a character"),
    "lists without an end": ("[" * 20_000, "nested too deep"),
    "objects in one another": ('{"a":' * 20_000 + "1" + "}" * 20_000, "nested too deep"),
    "a million values": ("[" + "1," * 1_200_000 + "1]", "more than 1,200,000 values"),
    "nothing": ("", "Expecting value"),
    "two documents": ("{} {}", "Extra data"),
    "a byte order mark": ("\ufeff{}", "Expecting value"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    text, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        parse(text.encode())


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(UnicodeDecodeError):
        parse(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="60,000,000 bytes, expected at most 50,000,000"):
        parse(b" " * 60_000_000)


def test_a_whole_character_and_the_length_that_tokenizers_write():
    assert parse(b'["\\ud83d\\ude00"]') == ["\U0001f600"]
    assert parse(b'{"model_max_length": 1000000000000000019884624838656}') == {"model_max_length": int(1e30)}
    assert math.copysign(1, parse(b"-0.0")) == -1


def test_a_message_is_one_line_that_a_terminal_only_shows():
    error = InputError("tensor \x1b[2J\nb\u202e: got \ud800")
    assert str(error) == "tensor \\x1b[2J\\nb\\u202e: got \\ud800"
    assert str(InputError("tensor é: got [1, 2]")) == "tensor é: got [1, 2]"
    long = one_line("a" * 1000 + "b" * 100_000 + "c" * 1000, most=400)
    assert len(long) < 400 and long.startswith("aaa") and long.endswith("ccc") and " .. " in long
