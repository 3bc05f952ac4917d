"""How far a quantized model's predictions are from the reference's, by the real llama-perplexity.

The reference runs once and writes a base file: its text's tokens, and the log-probabilities of every token of the
vocabulary at the later half of each chunk, 16 bits each. That is 2 bytes x vocabulary x positions: 134 MB for a chunk
of 512 tokens of Gemma's 262,144. Each other model is then run on the same tokens and compared with it.

Layout of a base file (little-endian), from `perplexity()` in tools/perplexity/perplexity.cpp, b11434: `_logits_`, i32
context, i32 vocabulary, i32 chunks, i32 tokens [chunks, context], then u16 [chunks, positions, row] where a row is the
vocabulary, rounded up to even, and two float32 of scale.

llama-perplexity exits with 0 after most errors, and reads garbage from a base of another vocabulary. So sizes are
checked here, before and after. Not checked: two tokenizers of the same size, which differ in everything.
"""

import math
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf_mixed.atomic_file import replacing
from gguf_mixed.errors import InputError
from gguf_mixed.llama_cpp import Log, asking_for, check_chunks, error_line, inference_options, last_line, run_tool
from gguf_mixed.tensors import read_inventory

# The program does not wait for its log at exit, so that the last lines, which hold the figures, may be lost: on two
# cores shared with six busy processes, by 6 runs of 6; with its main thread at niceness 5, 10 and 19, by 5, 3 and 0.
# That takes time, so each run goes one step further than the last. Shared with a dozen, all of the first six may fail.
NICENESS = (0, 5, 10, *[19] * 7)
LEAST_POSITIONS = 100  # llama-perplexity makes no statistics of fewer
DEFAULT_CONTEXT = 512

_HEADER = struct.Struct("<8siii")
_MAGIC = b"_logits_"
_EMBEDDINGS = "token_embd.weight"
_NUMBER = r"(-?(?:[\d.]+(?:e[+-]?\d+)?|nan|inf))"


@dataclass(frozen=True)
class Base:
    """A reference's log-probabilities: `chunks` of `context` tokens over `vocabulary` of them."""

    path: Path
    context: int
    vocabulary: int
    chunks: int

    @property
    def positions(self) -> int:
        """Tokens predicted: those of the later half of each chunk, so that each has something before it."""
        return self.chunks * positions_of(self.context)


@dataclass(frozen=True)
class Divergence:
    """A model against the reference. Kullback-Leibler divergences are in nats a position; `_error`: standard error.

    Attributes:
        mean_kld, mean_kld_error, median_kld, p90_kld, p95_kld, p99_kld, p999_kld, max_kld: over positions.
        same_top, same_top_error: share of positions with the same most likely token, 0 to 1.
        perplexity, perplexity_error: of the model on the text.
        base_perplexity: of the reference, from the base file, which holds no token less likely than e^-16 times the
            most likely one. Real text has such tokens, so this is too low: by 1% on a Python manual.
        perplexity_ratio, perplexity_ratio_error: model over `base_perplexity`, so too high by as much.
        chunks, positions: what the figures are over.
    """

    mean_kld: float
    mean_kld_error: float
    median_kld: float
    p90_kld: float
    p95_kld: float
    p99_kld: float
    p999_kld: float
    max_kld: float
    same_top: float
    same_top_error: float
    perplexity: float
    perplexity_error: float
    base_perplexity: float
    perplexity_ratio: float
    perplexity_ratio_error: float
    chunks: int
    positions: int


def positions_of(context: int) -> int:
    """Tokens of a chunk that are predicted and compared."""
    return context - 1 - context // 2


def base_bytes(vocabulary: int, chunks: int, context: int = DEFAULT_CONTEXT) -> int:
    """Size of a base file."""
    row = 2 * ((vocabulary + 1) // 2) + 4
    return _HEADER.size + 4 * chunks * context + 2 * chunks * positions_of(context) * row


def read_base(path: Path) -> Base:
    """Read the header of a base file and check that the rest is there.

    Raises:
        InputError: unreadable, another kind of file, or of another size than its header tells.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_HEADER.size)
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read: {error.strerror or error}") from error
    if not start.startswith(_MAGIC):
        raise InputError(f"{path.name}: not a base file of llama-perplexity: it does not start with {_MAGIC.decode()}")
    if len(start) < _HEADER.size:
        raise InputError(f"{path.name}: holds no logits: it ends within its header")
    _, context, vocabulary, chunks = _HEADER.unpack(start)
    if min(context, vocabulary, chunks) < 1:
        raise InputError(f"{path.name}: {chunks} chunks of {context} tokens, {vocabulary} in the vocabulary")
    expected = base_bytes(vocabulary, chunks, context)
    if size != expected:
        raise InputError(f"{path.name}: {size:,} bytes, expected {expected:,}: not written to its end")
    return Base(path, context, vocabulary, chunks)


def write_base(
    tool: Path,
    model: Path,
    text: Path,
    base_path: Path,
    *,
    chunks: int,
    context: int = DEFAULT_CONTEXT,
    threads: int | None = None,
    log: Log = lambda line: None,
    options: Sequence[str] = (),
    main_niceness: int = 0,
    held: Callable[[], object] = lambda: None,
) -> Base:
    """Run the reference over the start of a text; `base_path` appears only when it is complete.

    Args:
        tool: llama-perplexity.
        model: GGUF; of a split one, the first file.
        text: UTF-8.
        chunks: how many of `context` tokens. The text must hold so many, and at least two.
        log: gets every line printed; the chunks' perplexities come as one line at the end.
        options, main_niceness: more of llama-perplexity's; see `run_tool`.
        held: called once no other run can write here any more, before llama-perplexity is started.

    Raises:
        InputError: too little text, too few positions, the model is no GGUF, another run is writing this file, or
            llama-perplexity fails.
    """
    if chunks * positions_of(context) < LEAST_POSITIONS:
        raise InputError(f"{chunks} chunks of {context} tokens: at least {LEAST_POSITIONS} positions are needed")
    vocabulary = vocabulary_of(model)
    command = [*text_command(tool, model, text, chunks, context, threads), *options]
    with replacing(base_path) as partial:
        held()
        told = asking_for(chunks, context, text, log)
        lines = run_tool([*command, "--kl-divergence-base", str(partial)], told, main_niceness)
        return _check_written(partial, Base(base_path, context, vocabulary, chunks), text, lines)


def check_vocabulary(reference: Path, expected: int, model: Path) -> None:
    """Raises InputError: a model's vocabulary is of another size than the reference's."""
    found = vocabulary_of(model)
    if found != expected:
        raise InputError(f"{reference.name}: vocabulary of {expected}, {model.name} has {found}")


def divergence(
    tool: Path,
    model: Path,
    base_path: Path,
    *,
    threads: int | None = None,
    log: Log = lambda line: None,
) -> Divergence:
    """Run a model over the base's text and compare.

    Args:
        tool: llama-perplexity.
        model: GGUF with the reference's vocabulary.
        log: gets every line printed, one for each chunk.

    Raises:
        InputError: the base or the model cannot be read, they have different vocabularies, too few positions,
            llama-perplexity fails, or a figure is missing or not finite.
    """
    base = read_base(base_path)
    check_vocabulary(base_path, base.vocabulary, model)
    if base.positions < LEAST_POSITIONS:
        raise InputError(f"{base_path.name}: {base.positions} positions, at least {LEAST_POSITIONS} are needed")
    command = [str(tool), "-m", str(model), "--kl-divergence", "--kl-divergence-base", str(base_path)]
    command += [*_context_options(base.context), *inference_options(tool, threads)]
    for niceness in NICENESS:
        lines = run_tool(command, log, niceness)
        if _is_complete(lines):
            break
    return parse_divergence(lines, base)


def parse_divergence(lines: Sequence[str], base: Base) -> Divergence:
    """The figures among what llama-perplexity printed.

    Raises:
        InputError: one is missing or not finite, or a chunk is.
    """
    text = "\n".join(lines)
    done = max((int(number) for number in re.findall(r"^ *(\d+) .*±.*±.*±", text, re.M)), default=0)
    if done != base.chunks:
        reason = error_line(lines) or last_line(lines)
        raise InputError(f"llama-perplexity: compared {done} chunks, expected {base.chunks}: {reason}")
    mean, mean_error = _pair(text, "Mean    KLD")
    same, same_error = _pair(text, "Same top p")
    perplexity, perplexity_error = _pair(text, "Mean PPL(Q)")
    # A variance, of a model against itself by rounding below 0.
    text = re.sub(r"^(Mean PPL\(Q\)/PPL\(base\) .*±) +-?nan", r"\1 0", text, flags=re.M)
    ratio, ratio_error = _pair(text, "Mean PPL(Q)/PPL(base)")
    return Divergence(
        mean_kld=mean,
        mean_kld_error=mean_error,
        median_kld=_single(text, "Median  KLD"),
        p90_kld=_single(text, "90.0%   KLD"),
        p95_kld=_single(text, "95.0%   KLD"),
        p99_kld=_single(text, "99.0%   KLD"),
        p999_kld=_single(text, "99.9%   KLD"),
        max_kld=_single(text, "Maximum KLD"),
        same_top=same / 100,
        same_top_error=same_error / 100,
        perplexity=perplexity,
        perplexity_error=perplexity_error,
        base_perplexity=_pair(text, "Mean PPL(base)")[0],
        perplexity_ratio=ratio,
        perplexity_ratio_error=ratio_error,
        chunks=base.chunks,
        positions=base.positions,
    )


def vocabulary_of(model: Path) -> int:
    """Tokens that a GGUF has embeddings for, which are as many as it has tokens.

    Raises:
        InputError: see `read_inventory`; no embeddings.
    """
    embeddings = read_inventory(model).tensors.get(_EMBEDDINGS)
    if embeddings is None:
        raise InputError(f"{model.name}: has no tensor {_EMBEDDINGS}")
    return embeddings.n_elements // embeddings.row_length


def text_command(
    tool: Path, model: Path, text: Path, chunks: int, context: int = DEFAULT_CONTEXT, threads: int | None = None
) -> list[str]:
    """A run over the start of a text; of all of it where `chunks` is -1."""
    options = [*_context_options(context), *inference_options(tool, threads)]
    return [str(tool), "-m", str(model), "-f", str(text), "--chunks", str(chunks), *options]


def _context_options(context: int) -> list[str]:
    """One chunk at a time: several at once take their vocabulary x positions x 4 bytes together."""
    return ["--ctx-size", str(context), "--batch-size", str(context)]


def _check_written(partial: Path, expected: Base, text: Path, lines: Sequence[str]) -> Base:
    try:
        got = read_base(partial)
    except InputError as error:
        reason = error_line(lines) or f"{error}; the text must be of two chunks or more"
        raise InputError(f"llama-perplexity: no base of {text.name}: {reason}") from error
    check_chunks(got.chunks, expected.chunks, got.context, text)
    if (got.context, got.vocabulary) != (expected.context, expected.vocabulary):
        raise InputError(
            f"llama-perplexity: wrote a base of context {got.context} and vocabulary {got.vocabulary}, "
            f"expected {expected.context} and {expected.vocabulary}"
        )
    return expected


def _is_complete(lines: Sequence[str]) -> bool:
    return error_line(lines) is not None or any(line.startswith("Same top p") for line in lines)


def _single(text: str, label: str) -> float:
    return _numbers(text, label, _NUMBER)[0]


def _pair(text: str, label: str) -> tuple[float, float]:
    value, error = _numbers(text, label, rf"{_NUMBER} ± +{_NUMBER}")
    return value, error


def _numbers(text: str, label: str, pattern: str) -> list[float]:
    found = re.search(rf"^ *{re.escape(label)} *: *{pattern}(?:[ %]|$)", text, re.M)
    if not found:
        raise InputError(f"llama-perplexity: printed no {' '.join(label.split())!r} as expected")
    values = [float(value) for value in found.groups()]
    if not all(math.isfinite(value) for value in values):
        raise InputError(f"llama-perplexity: {' '.join(label.split())} is {found.group(1)}, expected a finite number")
    return values
