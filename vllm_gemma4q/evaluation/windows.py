"""Which tokens of a text a model is asked to predict, and from which context.

raw    llama-perplexity's protocol, so that figures can be compared with published ones: the text with one token of
       beginning in front, cut into chunks of `context` tokens whose first is replaced by that token; the later half of
       each chunk is predicted.
chat   the same text as a tuned model meets text: half of a chunk as what the user says, half as the answer, in the
       model's own chat template; the answer is predicted. Raw text is noise to such a model, and a figure taken there
       says little of its use.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from gguf_mixed.samples import in_template
from vllm_gemma4q.errors import InputError


class Framing(StrEnum):
    """How text is put before a model."""

    RAW = "raw"
    CHAT = "chat"


@dataclass(frozen=True)
class Window:
    """One prompt.

    Attributes:
        tokens: token ids.
        first, last: tokens `first` to `last` (excluded) are predicted, each from all before it.
    """

    tokens: Sequence[int]
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 < self.first < self.last <= len(self.tokens):
            raise ValueError(f"window of {len(self.tokens)} tokens: got {self.first} to {self.last} predicted")

    @property
    def n_predicted(self) -> int:
        return self.last - self.first


def cut_windows(tokenizer: Any, text: str, framing: Framing, context: int, chunks: int | None) -> list[Window]:
    """The first `chunks` windows of a text, all by default; what is left at its end is not used.

    Args:
        tokenizer: a fast tokenizer of transformers.
        context: tokens of a window: exactly (raw), at most (chat).

    Raises:
        InputError: too little text, no room, no chat template, or a broken one.
    """
    cut = _raw_windows if framing is Framing.RAW else _chat_windows
    windows: list[Window] = []
    for window in cut(tokenizer, text, context):
        if len(windows) == chunks:
            break
        windows.append(window)
    _check_enough(len(windows), context, chunks)
    return windows


def chunk_windows(tokens: Sequence[Sequence[int]], chunks: int | None) -> list[Window]:
    """Raw windows of a text that is cut already, its beginning in front of the first.

    Raises:
        InputError: fewer than `chunks`.
    """
    context = len(tokens[0]) if tokens else 0
    _check_enough(len(tokens), context, chunks)
    begin = tokens[0][0]
    return [Window([begin, *chunk[1:]], context // 2 + 1, context) for chunk in tokens]


def _check_enough(found: int, context: int, chunks: int | None) -> None:
    if not found or (chunks is not None and found < chunks):
        raise InputError(f"text: got {found} windows of {context} tokens, expected {chunks or 'at least 1'}")


def _raw_windows(tokenizer: Any, text: str, context: int) -> Iterator[Window]:
    first = context // 2 + 1
    if first >= context:
        raise InputError(f"--context: got {context}, expected at least 3")
    begin = _begin(tokenizer)
    ids = [*begin, *tokenizer.encode(text, add_special_tokens=False)]
    for start in range(0, len(ids) - context + 1, context):
        yield Window([*begin, *ids[start + len(begin) : start + context]], first, context)


def _chat_windows(tokenizer: Any, text: str, context: int) -> Iterator[Window]:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("tokenizer: has no chat template, expected one for --framing chat")
    # Tokens are cut from text and made again within the template: a few more or fewer at the seams.
    half = (context - len(_frame(tokenizer, "", "").tokens) - _SEAMS) // 2
    if half < 1:
        raise InputError(f"--context: got {context}, which leaves no room in the chat template")
    ids = tokenizer.encode(text, add_special_tokens=False)
    for start in range(0, len(ids) - 2 * half + 1, 2 * half):
        middle = start + half
        user, answer = tokenizer.decode(ids[start:middle]), tokenizer.decode(ids[middle : middle + half])
        framed = _frame(tokenizer, user, answer)
        tokens, last = framed.tokens[:context], min(framed.last, context)
        if answer.strip() and framed.first < last:
            yield Window(tokens, framed.first, last)


_SEAMS = 4


@dataclass(frozen=True)
class _Framed:
    tokens: list[int]
    first: int
    last: int


def _frame(tokenizer: Any, user: str, answer: str) -> _Framed:
    """A turn of each, and which tokens hold the answer. Templates strip what surrounds it."""
    answer = answer.strip()
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    framed = in_template(tokenizer, messages)
    begin = framed.rfind(answer)
    if begin < 0:
        raise InputError("tokenizer: its chat template changes the answer, expected it as it is")
    encoded = tokenizer(framed, add_special_tokens=False, return_offsets_mapping=True)
    inside = [
        index
        for index, (start, stop) in enumerate(encoded["offset_mapping"])
        if begin <= start and stop <= begin + len(answer) and start < stop
    ]
    return _Framed(list(encoded["input_ids"]), *((inside[0], inside[-1] + 1) if inside else (0, 0)))


def _begin(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
