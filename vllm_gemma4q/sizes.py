"""Sizes as people type them: `5GB` is 5 * 10**9 bytes, `5GiB` is 5 * 2**30."""

import re

from vllm_gemma4q.errors import InputError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes that a size stands for.

    Raises:
        InputError: not a positive number with an optional unit.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = (match[2] or "").capitalize() if match else ""
    n_bytes = int(float(match[1]) * _UNITS[unit]) if match else 0
    if n_bytes <= 0:
        raise InputError(f"size {text!r}: expected a positive number with a unit, such as 5GB or 500MiB")
    return n_bytes
