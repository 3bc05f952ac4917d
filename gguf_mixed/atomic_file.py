"""Files that are written whole or not at all, by one process at a time: for every command that writes single files.

A file is written beside its place as `NAME.partial`, flushed to the disk, renamed, and the folder's entry flushed too:
a kill, a full disk or a power failure leaves the old file or the new one. The partial file is also the lock, which the
system lets go of when its holder dies; the next run removes what a killed one left.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from gguf_mixed.errors import InputError

PARTIAL = ".partial"
_held: set[int] = set()


class WriteError(InputError):
    """A place cannot be written: unlike other bad input, this may be mended and the run resumed."""


@contextlib.contextmanager
def replacing(path: Path, suffix: str = PARTIAL) -> Iterator[Path]:
    """A temporary path, an empty file; what was written to it takes the place of `path` at the end of the block.

    Args:
        suffix: of the temporary name.

    Raises:
        WriteError: the system refuses, in the block or around it; another process is writing this file. Then, and
            whatever else the block raises, the temporary file is removed and `path` is as it was.
    """
    with refusals(path), exclusive(path, suffix) as partial:
        try:
            yield partial
            put_in_place(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def check_place(path: Path) -> None:
    """For commands that work long before they write: refuse at once what `replacing` would. Leaves nothing behind.

    Raises:
        WriteError: the folder is missing or may not be written, `path` is a folder, another run is writing it.
    """
    with refusals(path), exclusive(path) as partial:
        partial.unlink()


def check_not_read(path: Path, inputs: Iterable[Path | str | None]) -> None:
    """Refuse to put a result in the place of a file that the same command reads.

    Args:
        inputs: None and names that are no files are passed.

    Raises:
        InputError: `path` is one of them.
    """
    for source in inputs:
        if source is not None and path.exists() and Path(source).exists() and path.samefile(source):
            raise InputError(f"{path.name}: is read and would be written over: another name")


def write_file(path: Path, content: str | bytes) -> None:
    """Write a small file, text as UTF-8. Raises WriteError: see `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def exclusive(path: Path, suffix: str = PARTIAL) -> Iterator[Path]:
    """The temporary path of a file, empty, held for the time of the block, which has to rename or remove what is there.

    Raises:
        WriteError: another process holds it.
        OSError: it cannot be opened, or `path` is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    partial = path.with_name(path.name + suffix)
    descriptor = _open(partial)
    try:
        lock(descriptor, path)
        while not _is_at(descriptor, partial) or os.fstat(descriptor).st_size:
            # Its holder has just named or removed it, or was killed: a program that it started may still be writing,
            # for a moment, to what it left, so that goes and is not written over.
            if _is_at(descriptor, partial):
                partial.unlink()
            os.close(descriptor)
            descriptor = _open(partial)
            lock(descriptor, path)
        _held.add(descriptor)
        yield partial
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def held() -> tuple[int, ...]:
    """Descriptors of the locks that `exclusive` holds. Whoever has them open holds them too: a program that writes for
    this process does, so that the next run does not begin while that one, of a killed run, is still about to end."""
    return tuple(_held)


@contextlib.contextmanager
def exclusive_folder(folder: Path) -> Iterator[None]:
    """Hold a folder that is there, without a file in it. Raises WriteError: another process holds it, or see above."""
    with refusals(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def put_in_place(partial: Path, path: Path) -> None:
    """Give a written file its name, for good: it is on the disk when this returns."""
    flush(partial)
    partial.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Returns when a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no such thing for folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def refusals(path: Path) -> Iterator[None]:
    """What the system refuses becomes one line that names the file: the user's to mend."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror or error}") from error


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def lock(descriptor: int, path: Path) -> None:
    """Lock an open file for as long as it is open. Raises WriteError: another process holds it."""
    with refusals(path):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WriteError(f"{path}: another run is writing here") from error


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
