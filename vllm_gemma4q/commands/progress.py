"""Progress bars of bytes, on terminals only."""

import sys
from typing import NoReturn

from tqdm import tqdm


def byte_bar(total: int, description: str) -> "tqdm[NoReturn]":
    """A bar that ends at `total` bytes; its `update` takes the bytes done since the last call."""
    silent = not total or not sys.stderr.isatty()
    return tqdm(total=total, unit="B", unit_scale=True, desc=description, disable=silent)
