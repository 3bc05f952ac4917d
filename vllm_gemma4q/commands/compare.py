"""`gemma4q compare CKPT|MODEL.gguf.. --result FILE..`: one table and one picture of what was made of a base."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from gguf_mixed.commands.output import AsJson
from gguf_mixed.sweep_plot import require_matplotlib
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.vram.engines import GIB
from vllm_gemma4q.vram.plot import context_label

if TYPE_CHECKING:
    from vllm_gemma4q.compare.comparison import Comparison
    from vllm_gemma4q.compare.figures import Gsm8kGroup, TextGroup
    from vllm_gemma4q.compare.model import Model

NOT_MEASURED = "not measured"
_WIDTH = 190  # of the table where the output is no terminal


def command(
    models: Annotated[
        list[Path], typer.Argument(metavar="CKPT|MODEL.gguf..", help="Checkpoint folders and GGUF files of one base.")
    ],
    result: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="What gemma4q evaluate or sweep, or gguf-mixed divergence or sweep, printed with --json. Repeatable.",
        ),
    ] = None,
    context: Annotated[
        str | None, typer.Option(metavar="T", help="Tokens of the request that memory is for.", show_default="4K")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Write a picture too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Sizes, GPU memory and quality of several models beside each other. What was not measured is said to be so."""
    if plot is not None:
        require_matplotlib()
    if context is not None and "," in context:
        raise InputError(f"--context {context}: expected one number of tokens, such as 4K")
    from vllm_gemma4q.compare.comparison import compare

    found = compare(models, result or [], context)
    if plot is not None:
        if not (groups := found.drawable()):
            raise InputError(f"--plot {plot}: got no perplexity or divergence to draw, expected some in a --result")
        found.plot(groups, plot)
    if as_json:
        print(json.dumps(found.report()))
        return
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, markup=False)
    console.print(_table(found))
    for line in _notes(found):
        console.print(line, soft_wrap=True)
    if plot is not None:
        print(f"Plot: {plot}")


def _table(found: "Comparison") -> Table:
    """A section for each way of measuring, each with a row for every model."""
    table = Table("model", "scheme")
    memory = f"GiB at {context_label(found.tokens)}"
    for heading in ("size", "bits/weight", memory, "perplexity", "mean KLD", "p99", "same top"):
        table.add_column(heading, justify="right")
    for index in range(len(found.gsm8k)):
        table.add_column(_numbered("GSM8K", index, len(found.gsm8k)), justify="right")
    if not found.gsm8k:
        table.add_column("GSM8K", justify="right")
    for index, group in enumerate(found.text or [None]):
        table.add_section()
        if len(found.text) > 1:
            table.add_row(_text_name(found, index))
        for model, scheme in zip(found.models, found.schemes, strict=True):
            facts = (decimal(model.disk_bytes), f"{model.bits:.3f}", _memory(model, found.tokens))
            table.add_row(model.name, scheme, *facts, *_text_cells(group, model), *_gsm8k_cells(found.gsm8k, model))
    return table


def _numbered(what: str, index: int, count: int) -> str:
    return what if count == 1 else f"{what} {index + 1}"


def _text_name(found: "Comparison", index: int) -> str:
    return f"{_numbered('text', index, len(found.text))}, {found.text[index].framing}"


def _memory(model: "Model", tokens: int) -> str:
    from vllm_gemma4q.compare.model import memory_bytes

    rows = model.memory(tokens)
    return "\n".join(f"{memory_bytes(row, tokens) / GIB:.2f} {row.engine}" for row in rows)


def _text_cells(group: "TextGroup | None", model: "Model") -> tuple[str, str, str, str]:
    if group is None:
        return (NOT_MEASURED,) * 4
    from vllm_gemma4q.compare.figures import engine_name

    figures = group.of(model)
    ppl, kld = figures.perplexity, figures.divergence
    engine = "" if figures.engine is None else f"\n{engine_name(figures.engine)}"
    perplexity = NOT_MEASURED if ppl is None else f"{ppl['value']:.4f} ± {ppl['error']:.4f}{engine}"
    if group.is_reference(model):
        return perplexity, "reference", "reference", "reference"
    if kld is None:
        return perplexity, NOT_MEASURED, NOT_MEASURED, NOT_MEASURED
    mean = f"{kld['mean_kld']:.5f} ± {kld['error']:.5f}{engine}"
    return perplexity, mean, f"{kld['p99_kld']:.5f}", f"{kld['same_top']:.2%}"


def _gsm8k_cells(groups: "Sequence[Gsm8kGroup]", model: "Model") -> Iterator[str]:
    for group in groups:
        score = group.figures.get(model.sha256, {}).get("strict", {})
        if score.get("accuracy") is None:
            yield NOT_MEASURED
        else:
            low, high = score["interval"]
            yield f"{score['accuracy']:.2%} ({low:.2%} to {high:.2%})"
    if not groups:
        yield NOT_MEASURED


def _notes(found: "Comparison") -> Iterator[str]:
    """How figures came about, and what the table cannot say."""
    for index, group in enumerate(found.text):
        yield f"{_text_name(found, index)}: {group.title()}"
        if group.noise_floor is not None:
            floor = group.noise_floor
            yield (
                f"  noise floor, the reference from itself: mean KLD {floor['mean_kld']:.5f} ± {floor['error']:.5f}, "
                f"p99 {floor['p99_kld']:.5f}, same top {floor['same_top']:.2%}"
            )
    for index, runs in enumerate(found.gsm8k):
        yield f"{_numbered('GSM8K', index, len(found.gsm8k))}: {runs.title()}, 95% interval"
    yield "GiB: weights and KV cache of one request, computed from headers; what engines take beside them is not in it."
    if len({model.is_gguf for model in found.models}) > 1:
        yield "A GGUF holds the language model alone, a checkpoint its vision tower too: bits a weight leave that out."
    yield from found.origins
