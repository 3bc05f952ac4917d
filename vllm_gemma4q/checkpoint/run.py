"""The target folder of one rewrite: locked, atomic, resumable.

A run works inside its target. Finished files get their final name only after fsync; `config.json`,
without which no engine loads the folder, comes last. A journal (`.gemma4q-run.jsonl`) holds the
run's identity, then a line for each finished shard; it is also the lock, and goes when all is done.
So a kill at any moment leaves a folder that the same command completes, with the same bytes.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from gguf_mixed import strict_json
from gguf_mixed.atomic_file import WriteError, flush, refusals
from gguf_mixed.tasks import TaskLost
from vllm_gemma4q.checkpoint.direct_io import DirectWriter
from vllm_gemma4q.checkpoint.hashing import HashingWriter
from vllm_gemma4q.checkpoint.header import read_json
from vllm_gemma4q.errors import InputError, ReadError

JOURNAL = ".gemma4q-run.jsonl"
MANIFEST = "gemma4q-manifest.json"
_PARTIAL = ".partial"

# Of bad input, what says nothing against what is finished.
RESUMABLE = (WriteError, ReadError, TaskLost)


@dataclass(frozen=True)
class FinishedFile:
    """One output file as it lies on disk.

    `notes` are JSON values that a resumed run needs again: what was found while the file was made.
    """

    name: str
    n_bytes: int
    sha256: str
    notes: Mapping[str, Any] = field(default_factory=dict)


class Run:
    """Exclusive hold of a target folder for one rewrite, as a context manager.

    Args:
        target: output folder; created when absent, otherwise empty or left by the same run.
        identity: JSON values that decide every output byte: a resumed run must have the same.

    On an InputError in the source everything that this rewrite wrote is removed. On any other failure,
    finished shards and the journal stay, so that the run can resume; half-written files never do, and those of a
    process that was killed go when the run is entered again.
    """

    def __init__(self, target: Path, identity: Mapping[str, Any]):
        self.target = target
        self.identity = json.loads(json.dumps(identity))
        self.finished: dict[str, FinishedFile] = {}
        self._created: list[Path] = []
        self._journal: BinaryIO | None = None

    def finished_manifest(self) -> Mapping[str, Any] | None:
        """That of an earlier run of the same identity, if it has finished. Raises InputError: see `check_whole`."""
        manifest = manifest_of(self.target)
        if manifest.get("identity") != self.identity:
            return None
        check_whole(self.target, manifest)
        return manifest

    def __enter__(self) -> Self:
        try:
            with refusals(self.target):
                self._create_folder()
                self._open_journal()
                self._drop_partial()
        except BaseException:
            if self._journal is not None:
                self._journal.close()
            for path in reversed(self._created):
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._journal is not None
        # Removed while the lock is held: another run may take the folder the moment it is released.
        if kind is not None:
            with contextlib.suppress(OSError):
                self._clean_up(keep_finished=not issubclass(kind, InputError) or issubclass(kind, RESUMABLE))
        self._journal.close()

    def require_space(self, n_bytes: int) -> None:
        """Raises WriteError when the target's disk has less room than the shards still to be written need."""
        free = shutil.disk_usage(self.target).free
        needed = n_bytes - sum(file.n_bytes for file in self.finished.values())
        if needed > free:
            raise WriteError(f"{self.target}: disk has {free:,} bytes free, output needs {needed:,}")

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[HashingWriter]:
        """Write one file: under a temporary name, fsynced, renamed, recorded in `finished`."""
        with writing_partial(self.target, name) as hashing:
            yield hashing
        self.publish(FinishedFile(name, hashing.n_bytes, hashing.sha256.hexdigest()))

    def publish(self, file: FinishedFile, attempt: str = "") -> None:
        """Give a file its name that `writing_partial` has written, under the same `attempt`, here or elsewhere."""
        with refusals(self.target / file.name):
            _partial(self.target, file.name, attempt).replace(self.target / file.name)
            flush(self.target)
        self.finished[file.name] = file

    def record(self, name: str, notes: Mapping[str, Any] | None = None) -> None:
        """Note in the journal that a shard is finished, so that a resumed run skips it."""
        if notes:
            self.finished[name] = replace(self.finished[name], notes=notes)
        self._append(asdict(self.finished[name]))

    def write_bytes(self, name: str, content: bytes) -> None:
        with self.writing(name) as file:
            file.write(content)

    def complete(self) -> None:
        """Remove the journal: the target is done."""
        self._drop_partial()
        (self.target / JOURNAL).unlink()
        flush(self.target)

    def _create_folder(self) -> None:
        missing = [path for path in (self.target, *self.target.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir()
            self._created.append(path)
        check_takes_run(self.target)

    def _open_journal(self) -> None:
        self._journal = (self.target / JOURNAL).open("a+b")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{self.target}: another run is writing here") from error
        if os.fstat(self._journal.fileno()).st_nlink == 0:
            raise InputError(f"{self.target}: another run has just finished here")
        self._journal.seek(0)
        lines = self._journal.read().split(b"\n")[:-1]  # what follows the last newline was cut by a kill
        if not lines:
            if any(path.name != JOURNAL for path in self.target.iterdir()):
                (self.target / JOURNAL).unlink()  # just made: the run that was here has finished since we looked
                raise InputError(f"{self.target}: not empty, and not an unfinished run of this command")
            self._journal.truncate(0)
            self._append(self.identity)
            return
        found = [self._parsed(number, line) for number, line in enumerate(lines, 1)]
        if found[0] != self.identity:
            changed = _changed_keys(found[0], self.identity)
            raise InputError(f"{self.target}: holds an unfinished run with another {changed}; remove it to start anew")
        self._journal.truncate(sum(len(line) + 1 for line in lines))
        for number, value in enumerate(found[1:], 2):
            file = self._finished(number, value)
            path = self.target / file.name
            if Path(file.name).name == file.name and path.is_file() and path.stat().st_size == file.n_bytes:
                self.finished[file.name] = file

    def _parsed(self, number: int, line: bytes) -> Any:
        try:
            return strict_json.parse(line)
        except ValueError as error:
            raise self._damaged(number, str(error)) from error

    def _finished(self, number: int, value: Any) -> FinishedFile:
        kinds = {field.name: kind for field, kind in zip(fields(FinishedFile), (str, int, str, dict), strict=True)}
        if not isinstance(value, dict) or {"notes", *value} != kinds.keys():
            raise self._damaged(number, f"expected the keys {', '.join(kinds)}")
        for key, kind in kinds.items():
            if key in value and type(value[key]) is not kind:
                raise self._damaged(number, f"{key}: got {type(value[key]).__name__}, expected {kind.__name__}")
        return FinishedFile(**value)

    def _damaged(self, number: int, why: str) -> InputError:
        return InputError(f"{self.target / JOURNAL}: line {number}: damaged: {why}; remove the folder to start anew")

    def _append(self, value: Mapping[str, Any]) -> None:
        assert self._journal is not None
        with refusals(self.target / JOURNAL):
            self._journal.write(json.dumps(value, sort_keys=True).encode() + b"\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())

    def _drop_partial(self) -> None:
        for path in self.target.glob(f"*{_PARTIAL}"):
            path.unlink(missing_ok=True)

    def _clean_up(self, keep_finished: bool) -> None:
        self._drop_partial()
        if keep_finished and self.finished:
            return
        for name in [*self.finished, JOURNAL]:
            (self.target / name).unlink(missing_ok=True)
        for path in reversed(self._created):
            path.rmdir()


@contextlib.contextmanager
def writing_partial(target: Path, name: str, attempt: str = "") -> Iterator[HashingWriter]:
    """Write a file of `target` under a temporary name; it is whole and on the disk, or gone, when this is left.

    Needs no hold of the target. Two processes never write one file if each has an `attempt` of its own, and what is
    left of those that were killed over this file goes when another begins.
    """
    partial = _partial(target, name, attempt)
    with refusals(target / name):
        try:
            for left in target.glob(f"{name}.*{_PARTIAL}"):
                left.unlink(missing_ok=True)
            with contextlib.closing(DirectWriter(partial)) as writer:
                hashing = HashingWriter(writer)
                yield hashing
                writer.sync()
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _partial(target: Path, name: str, attempt: str) -> Path:
    return target / f"{name}{'.' if attempt else ''}{attempt}{_PARTIAL}"


def manifest_of(target: Path) -> Mapping[str, Any]:
    """The manifest in a folder; empty where no run has finished."""
    if (target / JOURNAL).exists() or not (target / MANIFEST).is_file():
        return {}
    return read_json(target / MANIFEST)


def check_whole(target: Path, manifest: Mapping[str, Any]) -> None:
    """Raises InputError: a file that a finished run has written is gone, or weights have another size."""
    for name, file in manifest["output"].items():
        path, expected = target / name, file["bytes"]
        found = f"{path.stat().st_size:,} bytes" if path.is_file() else "no file"
        if found == "no file" or (path.suffix == ".safetensors" and found != f"{expected:,} bytes"):
            raise InputError(f"{path}: got {found}, expected {expected:,} bytes; remove {target} to start anew")


def check_takes_run(target: Path) -> None:
    """Raises InputError: there is something that no run has left. A folder that is not there yet is fine."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: exists and is not a folder")
    if not (target / JOURNAL).exists() and any(target.iterdir()):
        raise InputError(f"{target}: not empty, and not an unfinished run of this command")


def _changed_keys(before: Any, after: Mapping[str, Any]) -> str:
    if not isinstance(before, dict):
        return "identity"
    return ", ".join(sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key)))
