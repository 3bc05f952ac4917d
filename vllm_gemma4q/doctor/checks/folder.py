"""The folder's shards and index, and files that do not belong there.

The plugin refuses a folder whose index is wrong. Stock vLLM reads whatever files the index names, and notices missing
tensors only where nothing is quantized.
"""

from collections.abc import Iterator

from vllm_gemma4q.doctor.engines import Engine
from vllm_gemma4q.doctor.finding import Finding, Severity, about
from vllm_gemma4q.doctor.subject import Problem, Subject

_REASONS = {
    "no-index": "the plugin does not know which of the files belong together; stock vLLM loads all",
    "missing-shard": "its tensors are missing",
    "damaged-shard": "no engine can read it",
    "stored-twice": "which one is loaded depends on the order of files",
    "stale-index": "the index is of other files",
}


def check(subject: Subject, engine: Engine) -> Iterator[Finding]:
    """Shards, index and pickle files."""
    for code, reason in _REASONS.items():
        problems = [problem for problem in subject.problems if problem.code == code]
        if problems:
            names = [problem.subject for problem in problems]
            first: Problem = problems[0]
            severity = _severity(code, subject, engine)
            yield from about(code, severity, names, first.found, first.expected, reason, _fix(code, subject))
    expected = "safetensors only"
    reason = "pickle files can run code when they are opened; engines take the safetensors beside them"
    fix = f"rm {subject.path}/{subject.pickles[0]}" if subject.pickles else ""
    yield from about("pickle-file", Severity.NOTE, subject.pickles, "a pickle file", expected, reason, fix)


def _severity(code: str, subject: Subject, engine: Engine) -> Severity:
    if code == "damaged-shard" or (engine.has_plugin and subject.is_claimed):
        return Severity.ERROR
    if code == "missing-shard":
        return Severity.WARNING if subject.quantization else Severity.ERROR
    return Severity.WARNING if code == "stored-twice" else Severity.NOTE


def _fix(code: str, subject: Subject) -> str:
    return subject.download if code in ("missing-shard", "damaged-shard") else subject.requantize
