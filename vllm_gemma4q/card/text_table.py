"""Perplexity and divergence of one run as a table, for cards and reports."""

from collections.abc import Sequence

from vllm_gemma4q.card.results import Measurement

_HEADINGS = (
    "tokens", "perplexity, original", "perplexity ± standard error", "mean KLD ± standard error, nats", "p99 KLD",
    "same top token",
)  # fmt: skip


def text_table(measured: Measurement) -> tuple[Sequence[str], dict[str, Sequence[str]]]:
    """Headings, and cells by framing; columns that nothing was measured for are left out."""
    rows = {framing: _cells(measured, framing) for framing in measured.found.perplexity}
    filled = [index for index in range(len(_HEADINGS)) if any(cells[index] for cells in rows.values())]
    chosen: dict[str, Sequence[str]] = {framing: [cells[index] for index in filled] for framing, cells in rows.items()}
    return [_HEADINGS[index] for index in filled], chosen


def _cells(measured: Measurement, framing: str) -> list[str]:
    found = measured.found.perplexity[framing]
    reference = None if measured.reference is None else measured.reference.perplexity.get(framing)
    original = "" if reference is None else f"{reference['value']:.4f}"
    cells = [f"{found['positions']:,}", original, f"{found['value']:.4f} ± {found['error']:.4f}"]
    kld = measured.found.divergence.get(framing)
    if kld is None:
        return [*cells, "", "", ""]
    return [*cells, f"{kld['mean_kld']:.5f} ± {kld['error']:.5f}", f"{kld['p99_kld']:.5f}", f"{kld['same_top']:.2%}"]
