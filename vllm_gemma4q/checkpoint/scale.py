"""A conversion by workers: a shard is a task, and so is the hash of a source file.

Workers write shards under temporary names of their own; this process, which holds the run, gives them their names and
keeps the journal. So one process resumes what many have left, and the other way round. The source is read twice, once
for its hashes.

What a worker does is decided by the plan alone, which it gets: it reads no configuration and plans nothing anew.
"""

import contextlib
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

from gguf_mixed.atomic_file import WriteError, refusals
from gguf_mixed.tasks import Attempt, Executor
from vllm_gemma4q.checkpoint.hashing import HashingReader
from vllm_gemma4q.checkpoint.rewrite import Progress, write_shard
from vllm_gemma4q.checkpoint.run import FinishedFile, Run, writing_partial
from vllm_gemma4q.checkpoint.steps import Shard
from vllm_gemma4q.errors import reading

_DISTRIBUTIONS = ("vllm-gemma4q", "torch", "numpy", "numba")


def rewrite_by_tasks(
    workers: Executor,
    shards: Sequence[Shard],
    run: Run,
    progress: Progress,
    hashed: Collection[Path],
    reads: Collection[Path] = (),
) -> dict[Path, str]:
    """What `rewrite` does, by workers.

    Args:
        progress: called with the number of source bytes consumed, by all of them; less than nothing for what is lost.
        reads: files beside the source that steps read.

    Raises:
        InputError: as `rewrite`; workers that do not see the same files or are of another version; TaskLost.
    """
    require_same_files(workers, run.target, {step.source.path for shard in shards for step in shard.steps} | {*reads})
    left = [shard for shard in shards if shard.name not in run.finished]
    progress(sum(shard.source_bytes for shard in shards if shard.name in run.finished))
    tasks: list[_Write | _Hash] = [_Write(run.target, shard) for shard in left]
    # Last, since they are short: what is started last should be, for all workers to end together.
    sources = sorted(hashed)
    tasks += map(_Hash, sources)
    hashes: dict[Path, str] = {}
    with contextlib.closing(workers.run(_carry_out, tasks, progress)) as results:
        for place, result in results:
            if isinstance(result, _Written):
                run.publish(result.file, result.attempt)
                run.record(result.file.name, result.notes)
            else:
                hashes[sources[place - len(left)]] = result
    return hashes


@dataclass(frozen=True)
class _Write:
    target: Path
    shard: Shard

    def __str__(self) -> str:
        return f"{self.target / self.shard.name}"


@dataclass(frozen=True)
class _Hash:
    path: Path

    def __str__(self) -> str:
        return f"SHA-256 of {self.path}"


@dataclass(frozen=True)
class _Written:
    """A shard that lies under the temporary name of an attempt."""

    attempt: str
    file: FinishedFile
    notes: Mapping[str, Any]


def _carry_out(task: _Write | _Hash, attempt: Attempt) -> _Written | str:
    if isinstance(task, _Hash):
        with contextlib.closing(HashingReader(task.path)) as reader:
            return reader.finish()
    with writing_partial(task.target, task.shard.name, attempt.name) as output:
        notes = write_shard(task.shard, output, attempt.progress)
    file = FinishedFile(task.shard.name, output.n_bytes, output.sha256.hexdigest())
    return _Written(attempt.name, file, notes)


@dataclass(frozen=True)
class _Look:
    """What another machine should find."""

    token: Path
    secret: str
    sizes: Mapping[Path, int]
    versions: Mapping[str, str]


def require_same_files(workers: Executor, target: Path, reads: Iterable[Path], also: Sequence[str] = ()) -> None:
    """Raises WriteError: a machine does not see the target or a source under the same path, or has other versions.

    Args:
        also: distributions whose versions matter, too.
    """
    secret = uuid4().hex
    token = target / f".gemma4q-{secret}.partial"
    sizes = {path: _size_of(path) for path in sorted(reads)}
    with refusals(token):
        token.write_text(secret)
    try:
        answers = workers.on_each_machine(_look, _Look(token, secret, sizes, _versions(also)))
    finally:
        token.unlink(missing_ok=True)
    for machine, complaint in answers.items():
        if complaint:
            raise WriteError(f"machine {machine}: {complaint}")


def _size_of(path: Path) -> int:
    with reading(path):
        return path.stat().st_size


def _look(wanted: _Look) -> str:
    """What is wrong here; nothing where all is well."""
    versions = _versions(wanted.versions)
    for name, version in wanted.versions.items():
        if versions.get(name) != version:
            return f"{name}: got {versions.get(name, 'none')}, expected {version} as on the machine that asks"
    try:
        found = wanted.token.read_text()
    except OSError as error:
        found = f"{error.strerror}"
    if found != wanted.secret:
        return f"{wanted.token.parent}: {found}, expected the target, on a file system that all machines share"
    for path, size in wanted.sizes.items():
        if not path.is_file() or path.stat().st_size != size:
            return f"{path}: not the file of {size:,} bytes that it is on the machine that asks; all must share it"
    return ""


def _versions(also: Iterable[str]) -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in dict.fromkeys([*_DISTRIBUTIONS, *also]):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
