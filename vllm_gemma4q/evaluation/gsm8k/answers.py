"""What a reply is worth, by the rules of lm-eval's task gsm8k (version 3, lm-eval 0.4.13).

Strict reads the first `#### NUMBER`, flexible the last thing that looks like a number. Both are compared as text, so
`18.00` is not `18`, and `...` at the end looks like a number to flexible, as it does in lm-eval. A reply that its
length limit cut is read like any other; only where it is not correct it counts as truncated.
"""

import re
from dataclasses import dataclass
from enum import StrEnum


class Parse(StrEnum):
    """How the number is found in a reply."""

    STRICT = "strict"
    FLEXIBLE = "flexible"


class Outcome(StrEnum):
    """Of one question. Only `WRONG` is a complete reply with a wrong number or none."""

    CORRECT = "correct"
    WRONG = "wrong"
    TRUNCATED = "truncated"
    EMPTY = "empty"
    ERROR = "error"


@dataclass(frozen=True)
class Reply:
    """A server's answer to one question.

    Attributes:
        text: what the model said.
        finish_reason: the API's, "length" where `max_tokens` cut the text.
        tokens: generated, as the server counts them; None where it does not say.
        error: why there is no reply, else None.
    """

    text: str = ""
    finish_reason: str | None = None
    tokens: int | None = None
    error: str | None = None


_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(?:-?[$0-9.,]{2,})|(?:-?[0-9]+)")
_IGNORED = tuple(map(re.compile, (",", r"\$", r"(?s).*#### ", r"\.$")))  # in this order


def extract(text: str, parse: Parse) -> str | None:
    """The number as the model wrote it, or None."""
    if parse is Parse.STRICT:
        match = _STRICT.search(text)
        return match[1] if match else None
    found = _FLEXIBLE.findall(text)
    return found[-1] if found else None


def normalise(number: str) -> str:
    """A number, or the dataset's whole answer, as it is compared: without `,`, `$`, `.. #### ` and a last dot."""
    for pattern in _IGNORED:
        number = pattern.sub("", number)
    return number.lower()


def outcome(reply: Reply, expected: str, parse: Parse) -> Outcome:
    """Args: expected: the right number, normalised."""
    if reply.error is not None:
        return Outcome.ERROR
    number = extract(reply.text, parse)
    if number is not None and normalise(number) == expected:
        return Outcome.CORRECT
    if reply.finish_reason == "length":
        return Outcome.TRUNCATED
    return Outcome.WRONG if reply.text.strip() else Outcome.EMPTY
