r"""Lists of module names in a checkpoint's configuration, and patterns in them: `re:` and a regular expression.

Python's engine backtracks: `(a+)+$` takes longer than anybody waits for 30 letters, and config.json is anybody's. Lists
of modules need no such patterns, so what may backtrack much is refused: a repetition of what repeats or branches
itself, more than MAX_REPEATS open repetitions (`.*`, `+`, `{3,}`), and back references.
"""

import re
import warnings
from functools import lru_cache
from re import _parser  # type: ignore[attr-defined]  # what re.compile parses with; public only as printed output
from typing import Any

from vllm_gemma4q.errors import InputError

MAX_REPEATS = 4
MAX_LENGTH = 1000
_REPEATS = frozenset({"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"})
_MANY = 16  # repetitions up to which a count is a short text rather than a repetition


def names_of(key: str, names: Any) -> tuple[str, ...]:
    """A list of modules. Raises InputError: it is none."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise InputError(f"config.json: quantization_config: {key} is {names!r}, expected a list of names")
    return tuple(names)


@lru_cache(maxsize=1024)
def compile_pattern(entry: str) -> re.Pattern[str]:
    """The expression behind `re:`, matched from the start as compressed-tensors does.

    Raises:
        InputError: it is none, or one that may backtrack without an end.
    """
    text = entry.removeprefix("re:")
    try:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"{len(text)} characters, expected at most {MAX_LENGTH}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python will read otherwise
            if _repeats(_parser.parse(text), False) > MAX_REPEATS:
                raise ValueError(f"more than {MAX_REPEATS} repetitions")
            return re.compile(text)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"config.json: {entry!r} is not a regular expression for names of modules ({error})"
        ) from error


def _repeats(parsed: Any, is_repeated: bool) -> int:
    """Open repetitions. Raises ValueError: one of what repeats or branches."""
    found = 0
    for operation, argument in parsed:
        name = str(operation)
        if name in _REPEATS:
            low, high, inner = argument
            if high > _MANY or (high != low and is_repeated):
                if is_repeated:
                    raise ValueError("a repetition of a repetition")
                found += 1
            found += _repeats(inner, is_repeated or high > 1)
        elif name == "BRANCH":
            if is_repeated:
                raise ValueError("a repetition of alternatives")
            found += sum(_repeats(branch, is_repeated) for branch in argument[1])
        elif name.startswith("GROUPREF"):
            raise ValueError("a back reference")
        elif name in ("SUBPATTERN", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"):
            found += _repeats(argument if name == "ATOMIC_GROUP" else argument[-1], is_repeated)
    return found
