"""All checks of one checkpoint for one engine, and the verdict.

Where the plugin serves a scheme, its own reading of the headers has the last word: what it refuses does not load, even
if no check here knows why.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_gemma4q.doctor.checks import (
    against_base,
    amx,
    coverage,
    exl3,
    folder,
    lists,
    parallel,
    scales,
    shapes,
    sidecars,
    support,
)
from vllm_gemma4q.doctor.engines import Engine
from vllm_gemma4q.doctor.finding import Finding, Severity
from vllm_gemma4q.doctor.subject import Subject, open_subject

if TYPE_CHECKING:  # what reads GGUF takes 100 MB of memory: only where there is one
    from gguf_mixed.tensors import Inventory

Check = Callable[[Subject, Engine], Iterator[Finding]]
CHECKS: tuple[Check, ...] = tuple(
    module.check
    for module in (folder, support, shapes, scales, lists, exl3, coverage, parallel, amx, sidecars, against_base)
)
_ORDER = list(Severity)


class Verdict(StrEnum):
    """What an engine will do."""

    LOADS = "loads"
    DEGRADED = "loads, but wrong or worse than it could be"
    FAILS = "would not load"


@dataclass(frozen=True)
class Diagnosis:
    """One engine's findings, the worst first."""

    engine: Engine
    findings: Sequence[Finding]

    @property
    def verdict(self) -> Verdict:
        severities = {finding.severity for finding in self.findings}
        if Severity.ERROR in severities:
            return Verdict.FAILS
        return Verdict.DEGRADED if Severity.WARNING in severities else Verdict.LOADS


def open_patient(path: Path, base: Path | None) -> "Subject | Inventory":
    """A checkpoint folder or a GGUF file.

    Raises:
        InputError: see `open_subject` and `read_inventory`.
    """
    if path.suffix != ".gguf" or not path.is_file():
        return open_subject(path, base)
    from gguf_mixed.tensors import read_inventory

    return read_inventory(path)


def diagnose(patient: "Subject | Inventory", engine: Engine, overrides: Path | None = None) -> Diagnosis:
    """Everything that is wrong for one engine.

    Args:
        overrides: the table that a GGUF file was made with.

    Raises:
        InputError: the table cannot be read.
    """
    if isinstance(patient, Subject):
        found = [finding for check in CHECKS for finding in check(patient, engine)]
        found += _refused(patient, engine, found)
    else:
        from vllm_gemma4q.doctor.checks import gguf

        found = list(gguf.check(patient, overrides, engine))
    return Diagnosis(engine, sorted(found, key=lambda finding: _ORDER.index(finding.severity)))


def _refused(subject: Subject, engine: Engine, found: Sequence[Finding]) -> Iterator[Finding]:
    """What the plugin refuses and no check explains."""
    if not engine.has_plugin or subject.refusal is None:
        return
    if any(finding.severity is Severity.ERROR for finding in found):
        return
    what, _, rest = subject.refusal.partition(": got ")
    got, _, expected = rest.partition(", expected ")
    yield Finding(
        "refused", Severity.ERROR, what.removeprefix("tensor "), got or subject.refusal,
        expected or "what the scheme allows", "the plugin refuses it", subject.restore,
    )  # fmt: skip
