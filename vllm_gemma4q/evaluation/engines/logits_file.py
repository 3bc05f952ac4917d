"""The file that llama-perplexity saves of a run (`--kl-divergence-base`): tokens, and distributions in 16 bits.

Layout: `gguf_mixed.perplexity`. A row starts with two float32, `scale` and `least`, and a token's log-probability is
`scale * code + least`, code 0 to 65535. `least` is that of the row's least likely token, but no less than 16 below the
most likely one's. So

- codes are a step of at most 16 / 65535 = 0.00024 nats apart, and a log-probability is off by half of that at most;
- all tokens less likely than e^-16 times the most likely one have the code 0, which says no more than that. Taken at
  their word they would be too likely by far: of a Gemma with 262,144 tokens (3 270M on a Python manual) they are 96%
  of the tokens, hold 0.05% of the probability, at most 0.2%, and would have 1.6%, at most 2.9%. So comparisons leave
  out what a reference holds to be less likely than `FLOOR`, as llama-perplexity does, whichever engine it is from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gguf_mixed.atomic_file import refusals
from gguf_mixed.perplexity import Base, positions_of
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.windows import Window

# llama-perplexity's own: what its reference holds to be less likely adds nothing to a divergence.
FLOOR = -16.0

_HEADER_BYTES = 20
_SCALES = 4  # uint16 that the two float32 of a row take
_VALUES_AT_ONCE = 1 << 22
_SAID = 12  # tokens before a difference that a message shows

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Header:
    """What stands before the distributions: `tokens` int32 [chunks, context], `vocabulary` their number."""

    tokens: Tokens
    vocabulary: int


def read_header(path: Path) -> Header | None:
    """From a file that may still be written. None: it has not come so far."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
        if len(start) < _HEADER_BYTES:
            return None
        context, vocabulary, chunks = (int(value) for value in np.frombuffer(start, "<i4", 3, offset=8))
        content = file.read(4 * chunks * context)
    if len(content) < 4 * chunks * context:
        return None
    return Header(np.frombuffer(content, "<i4").reshape(chunks, context), vocabulary)


def write_rows(base: Base, target: Path) -> None:
    """Turn the distributions of a complete file into float32 rows [positions, vocabulary], a few at a time.

    Tokens below `least` get that: an upper bound. Raises WriteError: the disk is full.
    """
    codes = base.vocabulary + base.vocabulary % 2
    rows = base.chunks * positions_of(base.context)
    offset = _HEADER_BYTES + 4 * base.chunks * base.context
    table = np.memmap(base.path, "<u2", "r", offset=offset, shape=(rows, _SCALES + codes))
    step = max(1, _VALUES_AT_ONCE // base.vocabulary)
    with refusals(target), target.open("wb") as file:
        for start in range(0, rows, step):
            block = np.array(table[start : start + step])
            file.write(decode(block, base.vocabulary).data)


def decode(block: npt.NDArray[np.uint16], vocabulary: int) -> npt.NDArray[np.float32]:
    """Rows of a file, uint16 [n, 4 + codes], as log-probabilities float32 [n, vocabulary]."""
    scales = np.ascontiguousarray(block[:, :_SCALES]).view("<f4")
    rows: npt.NDArray[np.float32] = block[:, _SCALES : _SCALES + vocabulary].astype(np.float32)
    rows *= scales[:, :1]
    rows += scales[:, 1:]
    return rows


def check_tokens(model: Path, found: Tokens, windows: Sequence[Window], tokenizer: Any = None) -> None:
    """The model was given the windows' tokens.

    Args:
        found: int32 [chunks, context]; of each chunk the first is that of the text, the model gets a beginning there.
        tokenizer: the windows' own, for words in the message.

    Raises:
        InputError: fewer chunks, or another token; says where.
    """
    if len(found) < len(windows):
        raise InputError(f"{model}: makes {len(found)} windows of the text, expected {len(windows)}: tokenizers differ")
    expected = np.array([window.tokens for window in windows], np.int32)
    differing = np.argwhere(found[: len(windows), 1:] != expected[:, 1:])
    if len(differing):
        window, place = (int(index) for index in differing[0] + (0, 1))
        before = expected[window, max(1, place - _SAID) : place].tolist()
        said = "" if tokenizer is None else f", after {tokenizer.decode(before)!r}"
        raise InputError(
            f"{model}: tokenizers differ: token {place} of window {window + 1} is {found[window, place]}, "
            f"expected {expected[window, place]}{said}"
        )
