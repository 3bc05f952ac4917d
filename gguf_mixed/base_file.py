"""A base file of llama-perplexity that is written once and reused: with a record of what it was made of.

The file itself tells its context, chunks and vocabulary, but neither the reference nor the text. `BASE.json` beside it
tells those, and a file is reused only where all agree. It is large (2 bytes x vocabulary x positions), so its size is
told and compared with the free space before anything runs.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from gguf_mixed import strict_json
from gguf_mixed.atomic_file import write_file
from gguf_mixed.errors import InputError
from gguf_mixed.identity import file_sha256, first_difference, model_sha256, named
from gguf_mixed.llama_cpp import Log
from gguf_mixed.perplexity import Base, base_bytes, read_base, vocabulary_of, write_base
from gguf_mixed.tensors import read_inventory

FORMAT = "gguf-mixed base 1"


@dataclass(frozen=True)
class Comparison:
    """What models are compared on: a reference, the start of a text in chunks of `context` tokens.

    Attributes:
        tool: llama-perplexity.
        threads: for it; None: its own choice.
    """

    tool: Path
    reference: Path
    text: Path
    chunks: int
    context: int
    threads: int | None = None

    @property
    def record(self) -> dict[str, object]:
        """What decides the content of the base file."""
        return {
            "format": FORMAT,
            "reference": named(self.reference, model_sha256(read_inventory(self.reference))),
            "text": named(self.text, file_sha256(self.text)),
            "chunks": self.chunks,
            "context": self.context,
        }

    @property
    def base_bytes(self) -> int:
        """Size of the base file."""
        return base_bytes(vocabulary_of(self.reference), self.chunks, self.context)


def record_path(base: Path) -> Path:
    """Where it says what a base file was made of."""
    return base.with_name(base.name + ".json")


def ensure_base(comparison: Comparison, path: Path, say: Log) -> Base:
    """The base file at `path`: the one that is there, or a new one.

    Args:
        say: gets one line: the size that is about to be written, or that the file is reused.

    Raises:
        InputError: the file there is of another reference, text, or size, or is damaged; too little space; see
            `write_base`.
    """
    expected = comparison.record
    if path.exists():
        _check_record(path, expected)
        say(f"base file {path}: {path.stat().st_size:,} bytes, reused")
        return read_base(path)
    size = comparison.base_bytes
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder")
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise InputError(
            f"base file {path}: takes {size:,} bytes, and {free:,} are free: fewer --chunks, or another --base"
        )
    say(f"base file {path}: {size:,} bytes ({decimal(size)}), made by running {comparison.reference.name}")

    # First the record: killed in between, it describes a file that is not there, and never is a file without one. But
    # not before the file is held: another run may be writing it, for another record.
    def record() -> None:
        write_file(record_path(path), json.dumps(expected, indent=1) + "\n")

    return write_base(
        comparison.tool,
        comparison.reference,
        comparison.text,
        path,
        chunks=comparison.chunks,
        context=comparison.context,
        threads=comparison.threads,
        held=record,
    )


def remove_base(path: Path) -> None:
    """Remove a base file and its record."""
    path.unlink(missing_ok=True)
    record_path(path).unlink(missing_ok=True)


def _check_record(path: Path, expected: dict[str, object]) -> None:
    try:
        found = strict_json.parse(record_path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: exists, and no {record_path(path).name} tells what it was made of") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{record_path(path)}: cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"{record_path(path)}: not a record of format {FORMAT}")
    difference = first_difference(found, expected)
    if difference:
        raise InputError(f"{path}: made with {difference}")
