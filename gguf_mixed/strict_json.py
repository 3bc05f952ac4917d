"""JSON as RFC 8259 has it, within bounds: what readers of files from elsewhere parse with.

The standard library also takes NaN, Infinity and numbers that become infinite, keys that are there twice, escapes that
are no characters, and integers of up to 4,300 digits. All of that is refused here, and so is what would not fit into
500 MB: Python makes up to 100 times as much of a document as it has bytes.
"""

import json
import math
import re
from typing import Any

MAX_BYTES = 50_000_000
# Values and keys; the header of a mixture of 128 experts a layer, one by one and packed, has half a million.
MAX_ITEMS = 1_200_000
_MAX_DIGITS = 40  # tokenizers without a limit say 10^30
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(text: bytes) -> Any:
    """The document's value.

    Raises:
        ValueError: it is none, or out of bounds; the message names no file.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{len(text):,} bytes, expected at most {MAX_BYTES:,}")
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > MAX_ITEMS:
        raise ValueError(f"more than {MAX_ITEMS:,} values")
    try:
        value = _decoder.decode(text.decode())
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if _SURROGATE.search(text):
        _refuse_lone_surrogates(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise ValueError(f"duplicate key {next(key for key, _ in pairs if key in seen or seen.add(key))!r}")  # type: ignore[func-returns-value]
    return found


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits, expected at most {_MAX_DIGITS}")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not finite")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _refuse_lone_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("an escape that is half a character") from error


_decoder = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_constant
)
