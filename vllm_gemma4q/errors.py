"""The one exception that a user is meant to see: the same one for both commands, since they share code."""

from gguf_mixed.errors import InputError, ReadError, reading

__all__ = ["InputError", "ReadError", "reading"]
