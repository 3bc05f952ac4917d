"""The table: for each format and engine, weights, KV cache and the rest, by context; and the longest that fits.

All sizes are bytes on one GPU, for one request of T tokens. Totals hold what is known: where an engine's other memory
is not measured it is not in them, and the longest context is an upper bound.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.vram.engines import VLLM, Engine, KvDtype, Request
from vllm_gemma4q.vram.kv_cache import least_bytes
from vllm_gemma4q.vram.source import Source
from vllm_gemma4q.vram.weights import Part

DEFAULT_CONTEXTS = tuple(1024 * 2**power for power in range(1, 9))


@dataclass(frozen=True)
class Row:
    """One format in one engine.

    Attributes:
        weights: bytes of each part.
        caches: bytes of the KV cache by context.
        least: what any engine would have to keep, by context.
        in_flight: tokens in flight that `caches` counts; None where it counts none.
        other: bytes beside weights and cache; None where nobody measured them.
        longest: the longest context that fits, 0 where none does; None where the GPU's memory was not told.
    """

    scheme: str
    engine: str
    kv_dtype: KvDtype
    in_flight: int | None
    weights: Mapping[Part, int]
    caches: Mapping[int, int]
    least: Mapping[int, int]
    other: int | None
    other_source: str
    longest: int | None

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the context."""
        return sum(self.weights.values()) + (self.other or 0)

    def total(self, tokens: int) -> int:
        """All that is known to be needed at a context of the table."""
        return self.fixed + self.caches[tokens]


def contexts_of(text: str | None, longest: int) -> list[int]:
    """Contexts from `2K,4K,100000`; by default those of the table that the model is made for, or its longest.

    Raises:
        InputError: something that is no number of tokens, or longer than the model is made for.
    """
    if text is None:
        return [tokens for tokens in DEFAULT_CONTEXTS if tokens <= longest] or [longest]
    contexts = [_tokens(item.strip()) for item in text.split(",")]
    for tokens in contexts:
        if tokens > longest:
            raise InputError(
                f"--context {text}: got {tokens} tokens, expected at most {longest}, the model's own limit"
            )
    return sorted(set(contexts))


def rows_of(
    sources: Sequence[Source],
    engines: Sequence[Engine],
    request: Request,
    contexts: Sequence[int],
    utilization: float = 1.0,
) -> list[Row]:
    """Every format in every engine.

    Args:
        utilization: the share of the GPU's memory that vLLM may use; the others may use all of it.

    Raises:
        InputError: an engine that does not load a format, does not split it so, or has no such KV cache.
    """
    return [_row(source, engine, request, contexts, utilization) for source in sources for engine in engines]


def report(model: str, rows: Sequence[Row], request: Request) -> dict[str, Any]:
    """What `--json` prints: bytes on one GPU, for one request."""
    return {
        "model": model,
        "tensor_parallel_size": request.ranks,
        "gpu_bytes": request.gpu_bytes,
        "rows": [_row_report(row) for row in rows],
    }


def _row(source: Source, engine: Engine, request: Request, contexts: Sequence[int], utilization: float) -> Row:
    weights = engine.weights(source, request)
    other, other_source = engine.other(request)
    fixed = sum(weights.values()) + (other or 0)
    longest = None
    if request.gpu_bytes is not None:
        budget = int(request.gpu_bytes * (utilization if engine.name == VLLM else 1.0)) - fixed
        longest = _longest(lambda tokens: engine.cache_bytes(source, request, tokens) <= budget, source.longest)
    size = engine.element_bytes(source, request)
    return Row(
        scheme=source.scheme,
        engine=engine.label,
        kv_dtype=request.kv_dtype,
        in_flight=engine.in_flight(source, request),
        weights=weights,
        caches={tokens: engine.cache_bytes(source, request, tokens) for tokens in contexts},
        least={tokens: least_bytes(source.cache, tokens, size, request.ranks) for tokens in contexts},
        other=other,
        other_source=other_source,
        longest=longest,
    )


def _longest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number of tokens up to `limit` that fits, by bisection; 0 where not even one does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _row_report(row: Row) -> dict[str, Any]:
    return {
        "scheme": row.scheme,
        "engine": row.engine,
        "kv_dtype": row.kv_dtype.value,
        "in_flight_tokens": row.in_flight,
        "weights_bytes": {part.value: size for part, size in row.weights.items()},
        "other_bytes": row.other,
        "other_source": row.other_source,
        "contexts": [
            {
                "tokens": tokens,
                "kv_cache_bytes": size,
                "least_kv_cache_bytes": row.least[tokens],
                "total_bytes": row.total(tokens),
            }
            for tokens, size in row.caches.items()
        ],
        "longest_context": row.longest,
    }


def _tokens(text: str) -> int:
    scale = 1024 if text[-1:] in ("K", "k") else 1
    digits = text[:-1] if scale > 1 else text
    if not digits.isdecimal() or int(digits) == 0:
        raise InputError(f"--context: got {text!r}, expected numbers of tokens such as 2K,4K,100000")
    return int(digits) * scale
