"""Samples for a calibration: `gguf_mixed.samples` cuts and frames them, here they are shared out among files.

Each file gets samples in proportion to its tokens, so that statistics by file (a class of use, for expert scores) can
be told apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from gguf_mixed.samples import cut_samples, describe_text, is_framed, read_texts
from vllm_gemma4q.errors import InputError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Samples:
    """Token ids to run.

    Attributes:
        ids: one list a sample.
        texts: of each sample, the file it was cut from.
        described: names and SHA-256 of the files.
        framing: `chat template` or `plain text`.
    """

    ids: Sequence[Sequence[int]]
    texts: Sequence[int]
    described: Sequence[dict[str, object]]
    framing: str

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.ids))


def load_samples(folder: Path, paths: Sequence[Path], n_samples: int, length: int, raw: bool = False) -> Samples:
    """Cut samples from files with the tokenizer of a checkpoint.

    Args:
        folder: the checkpoint.
        n_samples: in all; at least one a file.
        length: tokens of a sample, at most.
        raw: plain text, not the chat template.

    Raises:
        InputError: no tokenizer, no text, or too little of it.
    """
    if not 0 < len(paths) <= n_samples:
        raise InputError(
            f"got {n_samples} samples for {len(paths)} texts, expected at least one text and one sample each"
        )
    tokenizer = load_tokenizer(folder)
    contents = [read_texts([path]) for path in paths]
    shares = [n_samples]
    if len(paths) > 1:
        sizes = [len(tokenizer.encode(content, add_special_tokens=False)) for content in contents]
        shares = _shares(sizes, n_samples)
    ids: list[Sequence[int]] = []
    for path, content, share in zip(paths, contents, shares, strict=True):
        try:
            ids += cut_samples(tokenizer, content, share, length, raw)
        except InputError as error:
            raise InputError(f"{path.name}: {error}") from error
    texts = [number for number, share in enumerate(shares) for _ in range(share)]
    return Samples(ids, texts, describe_text(paths), "chat template" if is_framed(tokenizer, raw) else "plain text")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint, transformers' own object. Raises InputError: it has none, or none that loads."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):  # transformers would make one up
        raise InputError(f"{folder}: has no tokenizer: expected {' or '.join(_TOKENIZERS)}")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever it meets
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "custom code" in reason:  # it goes on to say how to run it
            reason = "it is code of the checkpoint's, which is never run"
        raise InputError(f"{folder}: transformers cannot load the tokenizer: {reason}") from error


def _shares(sizes: Sequence[int], total: int) -> list[int]:
    """`total` in proportion to sizes, at least 1 each: the largest remainders are rounded up."""
    spare = total - len(sizes)
    exact = np.array(sizes) * spare / max(sum(sizes), 1)
    shares = np.floor(exact).astype(int)
    for index in np.argsort(shares - exact, kind="stable")[: spare - int(shares.sum())]:
        shares[index] += 1
    return [1 + int(share) for share in shares]
