"""The one exception that a user is meant to see: the same one for both commands, since they share code."""

from gguf_mixed.errors import InputError

__all__ = ["InputError"]
