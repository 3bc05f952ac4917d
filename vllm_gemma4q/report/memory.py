"""Memory of the engines that load a checkpoint, beside cards of 16, 24, 48 and 80 GB.

A card of 24 GB has 24 GiB. vLLM is given its default share of them; what an engine needs beside weights and KV cache
is not measured, so that a context that fits here is an upper bound.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.vram.engines import GIB, KvDtype, Request, default_engines
from vllm_gemma4q.vram.source import open_source
from vllm_gemma4q.vram.table import Row, contexts_of, rows_of

CARDS = (16, 24, 48, 80)
UTILIZATION = 0.92  # of vllm serve
_SHOWN = (2048, 8192, 32768, 131072, 262144)


@dataclass(frozen=True)
class Memory:
    """Rows of `gemma4q vram`.

    Attributes:
        rows: by engine, with the contexts that are shown.
        longest: by engine, the longest context on each card; 0 where not even weights fit.
        refusal: why there are no rows.
    """

    rows: Sequence[Row] = ()
    longest: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    refusal: str | None = None

    def cards(self, engine: str) -> list[int]:
        """The cards that hold any context at all."""
        return [card for card, tokens in self.longest.get(engine, {}).items() if tokens]


def memory_of(path: Path) -> Memory:
    """The engines that load the format. A checkpoint that cannot be computed says why."""
    try:
        source = open_source(path)
        engines = default_engines(source, KvDtype.AUTO)
        contexts = [tokens for tokens in _SHOWN if tokens <= source.longest] or contexts_of(None, source.longest)
        rows = rows_of([source], engines, Request(), contexts)
        longest: dict[str, dict[int, int]] = {row.engine: {} for row in rows}
        for card in CARDS:
            for row in rows_of([source], engines, Request(gpu_bytes=card * GIB), contexts[:1], UTILIZATION):
                longest[row.engine][card] = row.longest or 0
    except InputError as error:
        return Memory(refusal=str(error))
    return Memory(rows, longest)
