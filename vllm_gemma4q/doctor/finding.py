"""One thing that is wrong with a checkpoint, for one engine."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """What a finding means for the engine."""

    ERROR = "error"  # it would not load
    WARNING = "warning"  # it loads, and is silently wrong or worse than it could be
    NOTE = "note"  # it loads and is right; worth knowing


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        code: stable, for programs: `missing-scale`.
        subject: the first tensor, key or file that it is about.
        found, expected: what it is, what it should be.
        reason: what the engine makes of it.
        fix: a command, or "" for notes that need none.
        count: how many tensors, keys or files it is about.
    """

    code: str
    severity: Severity
    subject: str
    found: str
    expected: str
    reason: str
    fix: str = ""
    count: int = 1

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "severity": self.severity.value}

    @property
    def line(self) -> str:
        """What was found, in one line."""
        more = f" (and {self.count - 1} more)" if self.count > 1 else ""
        return f"{self.subject}{more}: got {self.found}, expected {self.expected}"


def about(
    code: str, severity: Severity, names: Sequence[str], found: str, expected: str, reason: str, fix: str = ""
) -> list[Finding]:
    """One finding for all of the names, none where there are none."""
    return [Finding(code, severity, names[0], found, expected, reason, fix, len(names))] if names else []
