"""The result file: a line that says what was asked of whom, then a line for each question as its reply arrives.

    {"format": "gemma4q gsm8k 1", "identity": {"model": .., "questions": {"sha256": .., "count": 1319}, ..}}
    {"question": 7, "expected": "18", "text": "..", "finish_reason": "stop", "tokens": 61, "error": null}

Questions are numbered from 0. Scores are not written: they follow from `text` and `expected`. A question whose request
failed is asked again by a resumed run, and the last line of a question holds.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from gguf_mixed import strict_json
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.gsm8k.answers import Outcome, Parse, Reply, outcome

_FORMAT = "gemma4q gsm8k 1"


@dataclass
class Results:
    """Of one run, finished or not.

    Attributes:
        path: the file.
        identity: what was asked of whom.
        replies: by question.
        expected: normalised numbers, by question.
    """

    path: Path
    identity: Mapping[str, Any]
    replies: dict[int, Reply] = field(default_factory=dict)
    expected: dict[int, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Questions of the run, asked or not yet."""
        return int(self.identity["questions"]["count"])

    @property
    def answered(self) -> set[int]:
        """Questions that a resumed run does not ask again."""
        return {index for index, reply in self.replies.items() if reply.error is None}

    def outcomes(self, parse: Parse) -> dict[int, Outcome]:
        """Of the questions so far."""
        return {index: outcome(reply, self.expected[index], parse) for index, reply in self.replies.items()}

    def check_complete(self) -> None:
        """Raises InputError: questions were not asked yet."""
        if missing := self.count - len(self.replies):
            raise InputError(
                f"{self.path}: {missing:,} of {self.count:,} questions unanswered, expected a finished run"
            )


def read_results(path: Path) -> Results:
    """Raises InputError: no such file, or none that `gemma4q evaluate gsm8k` wrote; names the line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected results of gemma4q evaluate gsm8k") from error
    return _parse(path, content.split(b"\n")[:-1])


@contextmanager
def writing(path: Path, identity: Mapping[str, Any]) -> Iterator["Writer"]:
    """Begin a result file, or go on with one, for the time of the block.

    Raises:
        InputError: it cannot be written, another run is writing it, or it is of another run; says what differs.
    """
    try:
        file = path.open("a+b", buffering=0)  # a full disk shows at the line, not when the file is closed
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected a file that can be written") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{path}: another run is writing this file") from error
        except OSError as error:  # a file system without locks
            raise InputError(f"{path}: cannot be locked: {error.strerror}") from error
        yield Writer(_begin(path, file, identity), file)


class Writer:
    """Appends to a result file."""

    def __init__(self, results: Results, file: FileIO) -> None:
        self.results = results
        self._file = file

    def append(self, index: int, expected: str, reply: Reply) -> None:
        """Add one reply; it is in the file when this returns. Raises InputError: the disk is full."""
        _append(self.results.path, self._file, {"question": index, "expected": expected, **asdict(reply)})
        self.results.replies[index] = reply
        self.results.expected[index] = expected


def _begin(path: Path, file: FileIO, identity: Mapping[str, Any]) -> Results:
    file.seek(0)
    content = file.read()
    complete = content[: content.rfind(b"\n") + 1]  # a killed run may have cut its last line
    if not complete and content and not json.dumps({"format": _FORMAT})[:-1].encode().startswith(content[:20]):
        raise InputError(f"{path}: not written by gemma4q evaluate gsm8k, expected a new file or results to go on with")
    if not complete:
        file.truncate(0)
        _append(path, file, {"format": _FORMAT, "identity": identity})
        return Results(path, identity)
    found = _parse(path, complete.split(b"\n")[:-1])
    for key in sorted({*found.identity, *identity}):
        if found.identity.get(key) != identity.get(key):
            raise InputError(
                f"{path}: results of another run: {key}: {found.identity.get(key)}, expected {identity.get(key)}; "
                "give another --results, or remove the file"
            )
    file.truncate(len(complete))
    return found


def _append(path: Path, file: FileIO, value: Mapping[str, Any]) -> None:
    line = json.dumps(value).encode() + b"\n"
    try:
        while line:
            line = line[file.write(line) :]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run the same command again to go on") from error


def _parse(path: Path, lines: list[bytes]) -> Results:
    header = _object(path, 1, lines[0] if lines else b"")
    identity = header.get("identity")
    if header.get("format") != _FORMAT or not isinstance(identity, dict):
        raise InputError(f"{path}: line 1: format {header.get('format')!r}, expected {_FORMAT!r}")
    results = Results(path, identity)
    try:
        count = results.count
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: line 1: no count of questions") from error
    for number, line in enumerate(lines[1:], 2):
        value = _object(path, number, line)
        index, expected = value.get("question"), value.get("expected")
        if not isinstance(index, int) or not 0 <= index < count or not isinstance(expected, str):
            raise InputError(f"{path}: line {number}: question {index!r}, expected a number below {count}")
        text = value.get("text")
        if not isinstance(text, str):
            raise InputError(f"{path}: line {number}: key text: got {text!r}, expected a string")
        results.replies[index] = Reply(text, value.get("finish_reason"), value.get("tokens"), value.get("error"))
        results.expected[index] = expected
    return results


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = strict_json.parse(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{path}: line {number}: not a JSON object, expected results of gemma4q evaluate gsm8k")
    return value
