"""What the template shows beside the grid: verdicts, memory, quality, origin, the largest errors."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_gemma4q.card.results import Measured, Measurement
from vllm_gemma4q.card.text_table import text_table
from vllm_gemma4q.doctor.diagnose import Diagnosis, Verdict
from vllm_gemma4q.doctor.engines import Engine
from vllm_gemma4q.doctor.finding import Finding
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.report import words
from vllm_gemma4q.report.grid import Cell, Grid
from vllm_gemma4q.report.manifest import Manifest
from vllm_gemma4q.report.memory import CARDS, Memory
from vllm_gemma4q.vram.engines import GIB

_WORST = 10
_AXIS = 1.1  # of the last card, so that its name has room
_MARKS = {Verdict.LOADS: "✓", Verdict.DEGRADED: "!", Verdict.FAILS: "✗"}


@dataclass(frozen=True)
class VerdictView:
    """One engine; `kind` is `loads`, `degraded` or `fails`."""

    engine: str
    kind: str
    mark: str
    text: str
    findings: Sequence[Finding]


def verdicts(diagnoses: Sequence[Diagnosis]) -> list[VerdictView]:
    """Every engine's, in the order asked for."""
    return [
        VerdictView(
            _engine(one.engine),
            one.verdict.name.lower(), _MARKS[one.verdict], one.verdict.value, one.findings,
        )
        for one in diagnoses
    ]  # fmt: skip


def _engine(engine: Engine) -> str:
    """vLLM is told apart by the plugin, not by a name of ours."""
    if not engine.is_vllm:
        return engine.label
    return f"vLLM {engine.version} {'with' if engine.has_plugin else 'without'} the plugin"


def worst(grid: Grid) -> list[Cell]:
    """Cells with the largest errors, the largest first."""
    cells = [cell for cell in (*grid.cells.values(), *grid.outside.values()) if cell.errors is not None]
    return sorted(cells, key=lambda cell: -cell.errors.largest if cell.errors else 0.0)[:_WORST]


@dataclass(frozen=True)
class Bar:
    """Memory at one context; `weights`, `cache` and `other` are percent of the axis."""

    context: str
    total: str
    weights: float
    cache: float
    other: float
    cards: str


@dataclass(frozen=True)
class EngineMemory:
    """One engine's bars, and the longest context on each card."""

    engine: str
    in_flight: str
    weights: str
    other: str
    bars: Sequence[Bar]
    longest: Sequence[tuple[int, str]]


@dataclass(frozen=True)
class MemoryView:
    """All engines on one axis; `ticks` are cards at their percent of it."""

    engines: Sequence[EngineMemory]
    ticks: Sequence[tuple[int, float]]
    refusal: str | None


def memory_view(memory: Memory) -> MemoryView:
    """Bars of all engines."""
    largest = max((row.total(tokens) for row in memory.rows for tokens in row.caches), default=0) / GIB
    axis = next((card for card in CARDS if card >= largest), largest) * _AXIS
    engines = []
    for row in memory.rows:
        bars = []
        for tokens, cache in row.caches.items():
            fits = [str(card) for card in CARDS if memory.longest[row.engine][card] >= tokens]
            parts = (sum(row.weights.values()), cache, row.other or 0)
            weights, kept, other = (100 * part / GIB / axis for part in parts)
            fitting = f"{', '.join(fits)} GB" if fits else "none of these"
            bars.append(Bar(words.tokens(tokens), words.gib(row.total(tokens)), weights, kept, other, fitting))
        longest = [
            (card, words.tokens(tokens) if tokens else "does not fit")
            for card, tokens in memory.longest[row.engine].items()
        ]
        other_words = row.other_source if row.other is None else f"{words.gib(row.other)} ({row.other_source})"
        in_flight = "" if row.in_flight is None else f"{row.in_flight:,} tokens in flight"
        engines.append(
            EngineMemory(row.engine, in_flight, words.gib(sum(row.weights.values())), other_words, bars, longest)
        )
    return MemoryView(engines, [(card, 100 * card / axis) for card in CARDS if card <= axis], memory.refusal)


@dataclass(frozen=True)
class TextRow:
    """Perplexity and divergence of one framing; empty texts are left out of the table."""

    framing: str
    cells: Sequence[str]


@dataclass(frozen=True)
class ScoreRow:
    """One parse of GSM8K's answers; `low` and `high` are percent."""

    parse: str
    accuracy: str
    low: float
    high: float
    counts: str


@dataclass(frozen=True)
class Quality:
    """What result files say: tables of texts with their conditions, and scores of GSM8K with theirs."""

    texts: Sequence[tuple[str, Sequence[str], Sequence[TextRow]]]
    scores: Sequence[tuple[str, Sequence[ScoreRow]]]


def quality_view(results: Measured) -> Quality:
    """Tables of what was measured; nothing is filled in.

    Raises:
        InputError: a result file lacks a figure, or has it as something else.
    """
    try:
        return _quality(results)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"--result: damaged: {type(error).__name__}: {error}") from error


def _quality(results: Measured) -> Quality:
    texts = [_text_table(measured) for measured in results.text]
    scores = [
        (f"GSM8K, {found['run']['questions']['count']:,} questions", _score_rows(found)) for found in results.gsm8k
    ]
    return Quality(texts, scores)


def _text_table(measured: Measurement) -> tuple[str, Sequence[str], Sequence[TextRow]]:
    protocol = measured.protocol
    engine = " ".join(str(measured.engine[key]) for key in ("name", "version") if key in measured.engine)
    texts = ", ".join(text["name"] for text in protocol["texts"])
    conditions = f"{texts}, windows of {protocol['context']} tokens, {engine}"
    headings, rows = text_table(measured)
    return conditions, headings, [TextRow(framing, cells) for framing, cells in rows.items()]


def _score_rows(found: Mapping[str, Any]) -> list[ScoreRow]:
    rows = []
    for parse in ("strict", "flexible"):
        score = found[parse]
        if score["accuracy"] is None:  # no question had a reply
            continue
        low, high = score["interval"]
        counts = ", ".join(f"{score[key]} {words_}" for key, words_ in _COUNTS.items() if score[key])
        rows.append(ScoreRow(parse, f"{score['accuracy']:.2%}", 100 * low, 100 * high, counts))
    return rows


_COUNTS = {"truncated": "truncated", "empty": "empty", "error": "errors"}


@dataclass(frozen=True)
class Origin:
    """Who made the checkpoint, with what, from what.

    Attributes:
        command: None where there is no manifest.
        files: `source` or `output`, name, bytes and SHA-256.
    """

    command: str | None
    versions: Sequence[tuple[str, str]]
    files: Sequence[tuple[str, str, str, str]]
    stale: str | None


def origin_view(manifest: Manifest) -> Origin:
    """What the manifest says, as far as it has the usual form."""
    content = manifest.content
    if not content:
        return Origin(None, (), (), None)
    files = [
        (kind, name, f"{file.get('bytes', 0):,}", str(file.get("sha256", "")))
        for kind in ("source", "output")
        for name, file in (content.get(kind) or {}).items()
    ]
    versions = [(name, str(version)) for name, version in (content.get("versions") or {}).items()]
    return Origin(shlex.join(map(str, content.get("command") or [])), versions, files, manifest.stale)
