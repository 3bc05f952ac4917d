"""The one exception that a user of `gguf-mixed` is meant to see."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

_MOST = 1500


class InputError(Exception):
    """Bad input: one line that names the tensor, key or file, what was found and what was expected.

    Commands print it as `error: <message>` and exit with code 2. Names and values come from files: the message is made
    one line that a terminal only shows, and is cut where it is long.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class ReadError(InputError):
    """The system does not let a file be read: unlike other bad input, this may be mended and the run resumed."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system refuses becomes one line that names the file. Raises ReadError."""
    try:
        yield
    except OSError as error:
        raise ReadError(f"{path.name}: cannot be read: {error.strerror or error}") from error


def one_line(text: str, most: int = _MOST) -> str:
    """Text with characters that a terminal would act on as escapes; beyond `most`, without its middle."""
    if len(text) > most:
        text = f"{text[: most // 2]} .. {text[-most // 4 :]}"
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
