"""Damage to JSON that knows its structure: lying values, lost, renamed and repeated keys, and what is no JSON at all.

Documents are changed as Python values. `Raw` is a value that the standard library would not write (NaN, `1e999`, an
integer of 5,000 digits, ten thousand brackets), `Pairs` an object that may have a key twice.
"""

import json
from collections.abc import Callable
from random import Random
from typing import Any

from hostile.mutate_bytes import INTEGERS, mangle


class Raw(str):
    """Text that goes into the document as it is."""


class Pairs(list):
    """An object by its pairs."""


_DEEP = 20_000
_VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", [], {}, [[]], [None], {"": None}, 0, -1, 1, 0.5, -0.0, 1e308, -(2**63),
    Raw("NaN"), Raw("-Infinity"), Raw("Infinity"), Raw("1e999"), Raw("-0"), Raw("1" * 5000), Raw("1." + "0" * 5000),
    Raw("[" * _DEEP + "]" * _DEEP), Raw('{"a":' * _DEEP + "0" + "}" * _DEEP), Raw("[" * _DEEP), Raw('"\\ud800"'),
    Raw('{"a": 1, "a": 2}'), "\0", "\x1b[2J\x1b]0;title\x07", "line\nbreak", "\u202ereversed", "é" * 300, "a" * 100_000,
    "../../etc/passwd", "/etc/passwd", "..", ".", "C:\\windows", "//host/share", "re:(a+)+$", "re:(.*a){20}", "re:[",
    "re:",
    "**********a", "*?[!]", "{{ 7 * 7 }}", "__class__", "model.layers.99999999999999999999.mlp", [0] * 1000,
)  # fmt: skip
_KEYS = (
    "",
    "a",
    "__metadata__",
    "\0",
    "\x1b[2J",
    "line\nbreak",
    "../x",
    "0",
    "-1",
    "٣",
    "99999999999999999999",
    "x" * 5000,
)


def mangle_json(rng: Random, text: bytes) -> bytes:
    """Damage a document in one to three places; one time in six, its bytes instead."""
    if rng.random() < 1 / 6:
        return rng.choice((mangle, _other_encoding))(rng, text)
    document = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document = _change(rng, document)
    return dumps(document)


def dumps(value: Any) -> bytes:
    """The document's bytes, whatever is in it."""
    return _text(value).encode("utf-8", "surrogatepass")


def _text(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {_text(item)}" for key, item in value) + "}"
    if isinstance(value, dict):
        return _text(Pairs(value.items()))
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return json.dumps(value)


def _other_encoding(rng: Random, text: bytes) -> bytes:
    return rng.choice(
        (b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), b"\xff\xfe\xff", b"", b"null", b"[" + text + b"]",
         text + text, text[:-1] + b",}", b"\x80\x04\x95pickle", text.replace(b'"', b"'"), text + b"\0")
    )  # fmt: skip


def _change(rng: Random, document: Any) -> Any:
    """The document with one place changed."""
    places = list(_places(document, ()))
    if not places:
        return rng.choice(_VALUES)
    path = rng.choice(places)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if isinstance(parent, list):
        rng.choice(_LIST)(rng, parent, path[-1])
        return document
    changed = rng.choice(_OBJECT)(rng, parent, path[-1])
    return document if changed is None else _replaced(document, path[:-1], changed)


def _places(value: Any, path: tuple[Any, ...]) -> Any:
    """Every key and index; what is near the root counts as often as what is far from it, of which there is more."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if type(value) is list else ()
    for key, item in items:
        yield from [(*path, key)] * max(1, 6 - 2 * len(path))
        yield from _places(item, (*path, key))


def _replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return document


def lie(rng: Random, value: Any) -> Any:
    """Something else in the place of a value: often of its own kind."""
    if rng.random() < 0.5:
        return rng.choice(_VALUES)
    if isinstance(value, bool) or value is None:
        return rng.choice((not value, 0, 1, "true"))
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, 2 * value, value // 2, value * 10**6, rng.choice(INTEGERS),
                           10**30,
                           float(value), str(value)))  # fmt: skip
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value.upper(), "../" + value, "/" + value, value + "\0",
                           value * 2, [value],
                           value + "\n"))  # fmt: skip
    if isinstance(value, list):
        return rng.choice((value * 2, value[1:], value[::-1], [*value, None], [value], dict.fromkeys(map(str, value))))
    return rng.choice((list(value), str(value), {}, {**value, "extra": 1})) if isinstance(value, dict) else 0


def _lie_in_object(rng: Random, parent: dict[str, Any], key: str) -> None:
    parent[key] = lie(rng, parent[key])


def _lose(rng: Random, parent: dict[str, Any], key: str) -> None:
    del parent[key]


def _rename(rng: Random, parent: dict[str, Any], key: str) -> None:
    parent[rng.choice((*_KEYS, key + "x", key.upper(), *parent))] = parent.pop(key)


def _add(rng: Random, parent: dict[str, Any], key: str) -> None:
    parent[rng.choice((*_KEYS, key + "2"))] = rng.choice(_VALUES)


def _swap(rng: Random, parent: dict[str, Any], key: str) -> None:
    other = rng.choice(list(parent))
    parent[key], parent[other] = parent[other], parent[key]


def _twice(rng: Random, parent: dict[str, Any], key: str) -> Pairs:
    return Pairs([*parent.items(), (key, rng.choice((parent[key], lie(rng, parent[key]))))])


def _lie_in_list(rng: Random, parent: list[Any], index: int) -> None:
    parent[index] = lie(rng, parent[index])


def _lose_item(rng: Random, parent: list[Any], index: int) -> None:
    del parent[index]


def _repeat_item(rng: Random, parent: list[Any], index: int) -> None:
    parent[index:index] = [parent[index]] * rng.choice((1, 1, 2, 1000))


_OBJECT: tuple[Callable[..., Pairs | None], ...] = (
    _lie_in_object, _lie_in_object, _lie_in_object, _lie_in_object, _lose, _rename, _add, _swap, _twice,
)  # fmt: skip
_LIST: tuple[Callable[..., None], ...] = (_lie_in_list, _lie_in_list, _lose_item, _repeat_item)
