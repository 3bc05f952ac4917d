"""What result files say of one checkpoint; `compare.results` reads them, by digest and never by name."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_gemma4q.compare.results import Entry, Json, Results, gsm8k_results, text_results


@dataclass(frozen=True)
class Measurement:
    """Perplexity and perhaps divergence of one run.

    Attributes:
        protocol: texts, context, windows, engine, see `evaluation.measure.Protocol.to_json`.
        found: figures of the checkpoint.
        reference: those of the original in the same run, where it was one of those measured.
    """

    protocol: Json
    found: Entry
    reference: Entry | None

    @property
    def engine(self) -> Json:
        """What ran the checkpoint."""
        engine: Json = self.found.engine or self.protocol["engine"]
        return engine


@dataclass(frozen=True)
class Measured:
    """All that was measured of one checkpoint, in the order of the files."""

    text: Sequence[Measurement] = ()
    gsm8k: Sequence[Json] = ()


def of_checkpoint(results: Iterable[Results], sha256: str) -> Measured:
    """The part of result files that is of the checkpoint with this digest."""
    results = list(results)
    text = [
        Measurement(each.protocol, entry, None if entry is each.reference else each.reference)
        for each in text_results(results)
        for entry in each.entries
        if entry.sha256 == sha256
    ]
    gsm8k = [each.document for each in gsm8k_results(results) if each.models[0].get("sha256") == sha256]
    return Measured(text, gsm8k)
