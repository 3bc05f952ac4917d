"""The one exception that a user of `gguf-mixed` is meant to see."""


class InputError(Exception):
    """Bad input: one line that names the tensor, key or file, what was found and what was expected.

    Commands print it as `error: <message>` and exit with code 2.
    """
