"""The folder's shards and index, and files that do not belong there.

The plugin refuses a folder whose index is wrong. Stock vLLM reads whatever files the index names, and notices missing
tensors only where nothing is quantized.
"""

import contextlib
import shlex
from collections.abc import Iterator

from vllm_gemma4q.checkpoint.header import read_json
from vllm_gemma4q.checkpoint.reader import CONFIG
from vllm_gemma4q.doctor.engines import Engine
from vllm_gemma4q.doctor.finding import Finding, Severity, about
from vllm_gemma4q.doctor.subject import Problem, Subject
from vllm_gemma4q.errors import InputError

_CONFIGURATIONS = (
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
_REASONS = {
    "no-index": "the plugin does not know which of the files belong together; stock vLLM loads all",
    "missing-shard": "its tensors are missing",
    "damaged-shard": "no engine can read it",
    "stored-twice": "which one is loaded depends on the order of files",
    "stale-index": "the index is of other files",
}


def check(subject: Subject, engine: Engine) -> Iterator[Finding]:
    """Shards, index, pickle files and code."""
    for code, reason in _REASONS.items():
        problems = [problem for problem in subject.problems if problem.code == code]
        if problems:
            names = [problem.subject for problem in problems]
            first: Problem = problems[0]
            severity = _severity(code, subject, engine)
            yield from about(code, severity, names, first.found, first.expected, reason, _fix(code, subject))
    expected = "safetensors only"
    reason = "pickle files can run code when they are opened; engines take the safetensors beside them"
    # Not `folder / name`, which loses the "./" that keeps a name from being an option.
    fix = "rm " + shlex.quote(f"{subject.folder}/{subject.pickles[0]}") if subject.pickles else ""
    yield from about("pickle-file", Severity.NOTE, subject.pickles, "a pickle file", expected, reason, fix)
    reason = (
        "Gemma 4 needs none; no engine runs it unless it is told to trust the checkpoint, and nobody should tell it"
    )
    names = [*_with_auto_map(subject), *sorted(path.name for path in subject.folder.glob("*.py"))]
    yield from about("remote-code", Severity.NOTE, names, "code, or a name of some", "none", reason)


def _with_auto_map(subject: Subject) -> Iterator[str]:
    """Configurations that name classes of the checkpoint's own, or of another repository."""
    for name in (CONFIG, *_CONFIGURATIONS):
        path = subject.folder / name
        if path.is_file():
            with contextlib.suppress(InputError):
                found = read_json(path)
                if any("auto_map" in place for place in (found, *found.values()) if isinstance(place, dict)):
                    yield name


def _severity(code: str, subject: Subject, engine: Engine) -> Severity:
    if code == "damaged-shard" or (engine.has_plugin and subject.is_claimed):
        return Severity.ERROR
    if code == "missing-shard":
        return Severity.WARNING if subject.quantization else Severity.ERROR
    return Severity.WARNING if code == "stored-twice" else Severity.NOTE


def _fix(code: str, subject: Subject) -> str:
    return subject.download if code in ("missing-shard", "damaged-shard") else subject.requantize
