"""The one exception that a user of `gguf-mixed` is meant to see."""

_MOST = 1500


class InputError(Exception):
    """Bad input: one line that names the tensor, key or file, what was found and what was expected.

    Commands print it as `error: <message>` and exit with code 2. Names and values come from files: the message is made
    one line that a terminal only shows, and is cut where it is long.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str, most: int = _MOST) -> str:
    """Text with characters that a terminal would act on as escapes; beyond `most`, without its middle."""
    if len(text) > most:
        text = f"{text[: most // 2]} .. {text[-most // 4 :]}"
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
