"""Run one conversion from checkpoint to checkpoint: shards, sidecars, index, manifest, then config.json."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from gguf_mixed.tasks import Executor
from vllm_gemma4q.checkpoint.reader import CONFIG, INDEX, Checkpoint
from vllm_gemma4q.checkpoint.rewrite import Progress, rewrite
from vllm_gemma4q.checkpoint.run import MANIFEST, FinishedFile, Run
from vllm_gemma4q.checkpoint.scale import rewrite_by_tasks
from vllm_gemma4q.checkpoint.sidecars import sidecars, to_json
from vllm_gemma4q.checkpoint.steps import MAX_SHARD_BYTES, Shard, Step, pack
from vllm_gemma4q.errors import InputError, reading

VERSION = metadata.version("vllm-gemma4q")
_DEPENDENCIES = ("torch",)


@dataclass(frozen=True)
class Conversion:
    """Everything that decides the output of one command.

    `steps` are in the order of their sources' bytes; `config` is the new config.json; `summary` goes into the
    manifest as it is, and so do `details`, which may name every tensor. Steps may also take tensors from `base`,
    a second checkpoint of which nothing else is read. `files` are small ones to be written beside the weights, by
    name, in place of the source's of that name. `settings` decide the output beside the steps, and `reads` are other
    files that do: a resumed run must share both. `conclude` turns the notes of all steps that compute into more
    details. `check_machine` raises InputError where this process cannot carry out the steps; workers may lie elsewhere.
    """

    scheme: str
    source: Checkpoint
    steps: Sequence[Step]
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    max_shard_bytes: int = MAX_SHARD_BYTES
    details: Mapping[str, Any] = field(default_factory=dict)
    base: Checkpoint | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    reads: Sequence[Path] = ()
    conclude: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    check_machine: Callable[[], object] = lambda: None

    @cached_property
    def shards(self) -> list[Shard]:
        return pack(self.steps, self.max_shard_bytes)

    @property
    def source_bytes(self) -> int:
        return sum(shard.source_bytes for shard in self.shards)

    @property
    def output_bytes(self) -> int:
        """Size of all output shards, headers included."""
        return sum(len(shard.header()) + shard.n_bytes for shard in self.shards)

    @property
    def sidecars(self) -> list[Path]:
        """Files of the source to be copied as they are."""
        return [path for path in sidecars(self.source.folder) if path.name not in self.files]

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it resumes."""
        plan = [_decided(step, step.source.path in self.source.shards) for step in self.steps]
        written = {name: _sha256(content) for name, content in self.files.items()}
        decided = json.dumps([plan, self.config, self.max_shard_bytes, written], sort_keys=True)
        files = [*self.source.shards, self.source.folder / CONFIG]  # others are copied when all else is done
        identity = {
            "tool version": VERSION,
            "scheme": self.scheme,
            "plan": _sha256(decided.encode()),
            "source": _stamps(files),
            **({"settings": dict(self.settings)} if self.settings else {}),
            **({"read": _stamps(self.reads)} if self.reads else {}),
        }
        return identity if self.base is None else {**identity, "base": self.base.digests or _stamps(self.base.shards)}


def _decided(step: Step, is_from_source: bool) -> list[Any]:
    """What a step's bytes depend on beside the files and the scheme."""
    constants = [_sha256(constant.data) for constant in step.constants]
    return [is_from_source, step.source.name, step.spans, [asdict(output) for output in step.written], constants]


def _stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of modification of each file. Raises ReadError."""
    found = {}
    for path in files:
        with reading(path):
            state = path.stat()
        found[path.name] = [state.st_size, state.st_mtime_ns]
    return found


def convert(
    conversion: Conversion,
    target: Path,
    command: Sequence[str],
    progress: Progress,
    verify: Callable[[Sequence[Path]], object] | None = None,
    workers: Executor | None = None,
) -> bool:
    """Write a conversion into `target`, resuming an unfinished run of the same one.

    Args:
        command: as the user typed it, for the manifest.
        progress: called with source bytes consumed.
        verify: called with the finished shards before anything makes them a checkpoint; may raise InputError.
        workers: write the shards, to the same bytes; None: this process does.

    Returns:
        False when an earlier run had already finished and nothing was done.

    Raises:
        InputError: the target is not ours to write, is full or read-only, or the source is bad (see `rewrite`); workers
            cannot be used or were lost (see `rewrite_by_tasks`); an earlier run had finished, and a file of it is not
            as it was, or a small file of the source.
    """
    for checkpoint in (conversion.source, conversion.base):
        if checkpoint is not None:
            refuse_inside(target, checkpoint.folder)
    run = Run(target, conversion.identity())
    copied = conversion.sidecars
    manifest = run.finished_manifest()
    if manifest is not None:
        _check_copies(copied, manifest, target)
        return False
    if workers is None:
        conversion.check_machine()
    with run:
        run.require_space(conversion.output_bytes)
        shards = conversion.shards
        if workers is None:
            source_hashes = rewrite(shards, run, progress, conversion.source.shards)
        else:
            source_hashes = rewrite_by_tasks(workers, shards, run, progress, conversion.source.shards, conversion.reads)
        if verify is not None:
            verify([target / shard.name for shard in shards])
        for path in copied:
            with reading(path):
                content = path.read_bytes()
            run.write_bytes(path.name, content)
        for name, content in conversion.files.items():
            run.write_bytes(name, content)
        if conversion.identity() != run.identity:
            raise InputError(f"{conversion.source.folder}: changed while it was read")
        config = to_json(conversion.config)
        if len(shards) > 1:
            run.write_bytes(INDEX, to_json(_index(shards)))
        sources = _sources(conversion.source, run, source_hashes, copied)
        run.write_bytes(MANIFEST, to_json(_manifest(conversion, run, sources, command, config)))
        run.write_bytes(CONFIG, config)
        run.complete()
    return True


def refuse_inside(target: Path, folder: Path) -> None:
    """Raises InputError: one of both lies in the other."""
    source = folder.resolve()
    if target.resolve().is_relative_to(source) or source.is_relative_to(target.resolve()):
        raise InputError(f"{target}: the target must lie outside the source {folder}")


def _index(shards: Iterable[Shard]) -> dict[str, Any]:
    weight_map = {output.name: shard.name for shard in shards for output in shard.outputs}
    return {"metadata": {"total_size": sum(shard.n_bytes for shard in shards)}, "weight_map": weight_map}


def _check_copies(copied: Iterable[Path], manifest: Mapping[str, Any], target: Path) -> None:
    """Raises InputError: a small file of the source is another one since, and the finished target has not got it."""
    for path in copied:
        with reading(path):
            found = path.read_bytes()
        then = manifest["output"].get(path.name)
        if then and then["sha256"] != _sha256(found) and found != (target / path.name).read_bytes():
            raise InputError(f"{path}: changed since {target} was finished; copy it there, or remove {target}")


def _sources(
    source: Checkpoint, run: Run, shards: Mapping[Path, str], copied: Iterable[Path]
) -> dict[str, dict[str, Any]]:
    """Size and hash of what was read, by name."""
    with reading(source.folder / CONFIG):
        hashes = {path.name: digest for path, digest in shards.items()}
        hashes[CONFIG] = _sha256((source.folder / CONFIG).read_bytes())
    found = {name: {"bytes": run.identity["source"][name][0], "sha256": digest} for name, digest in hashes.items()}
    found |= {path.name: _described(run.finished[path.name]) for path in copied}
    return dict(sorted(found.items()))


def _described(file: FinishedFile) -> dict[str, Any]:
    return {"bytes": file.n_bytes, "sha256": file.sha256}


def _manifest(
    conversion: Conversion, run: Run, sources: Mapping[str, Any], command: Sequence[str], config: bytes
) -> dict[str, Any]:
    outputs = {name: _described(file) for name, file in sorted(run.finished.items())}
    outputs[CONFIG] = {"bytes": len(config), "sha256": _sha256(config)}
    details = dict(conversion.details)
    if conversion.conclude is not None:
        notes = {key: note for _, file in sorted(run.finished.items()) for key, note in file.notes.items()}
        details |= conversion.conclude(notes)
    return {
        "identity": run.identity,
        "command": list(command),
        "versions": {
            "vllm-gemma4q": VERSION,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _DEPENDENCIES},
        },
        "summary": conversion.summary,
        **({"details": details} if details else {}),
        "source": sources,
        "output": outputs,
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
