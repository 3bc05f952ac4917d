"""`gemma4q card DST --result FILE [--beside CKPT]`: a model card of what was made and measured, and its picture."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import typer

from gguf_mixed.atomic_file import write_file
from gguf_mixed.commands.output import AsJson
from gguf_mixed.sweep_plot import require_matplotlib
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.header import read_json
from vllm_gemma4q.checkpoint.run import MANIFEST
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.vram.engines import Request, parse_engine
from vllm_gemma4q.vram.table import contexts_of, rows_of

CARD = "README.md"


def command(
    checkpoint: Annotated[Path, typer.Argument(metavar="DST", help="A checkpoint that gemma4q wrote.")],
    result: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="What evaluate or sweep printed with --json. Repeatable.")
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="CKPT|MODEL.gguf", help="Draw a picture beside this one of the same base and --result. Repeatable."
        ),
    ] = None,
    base_model: Annotated[str | None, typer.Option(metavar="ID", help="Hugging Face id of the original.")] = None,
    author: Annotated[str | None, typer.Option(metavar="NAME", help="Who quantized it.")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="NAME", help="The original's, such as apache-2.0.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading, and name of the repository; DST's name.")] = None,
    context: Annotated[str | None, typer.Option(metavar="2K,4K,..", help="Contexts of the table of memory.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="DST/README.md; - for standard output, without a picture."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a Hugging Face model card from the manifest and result files only. What was not measured is left out."""
    if beside:
        require_matplotlib()
    manifest = _manifest(checkpoint)
    from vllm_gemma4q.card.card import Card
    from vllm_gemma4q.card.experts import stored_in
    from vllm_gemma4q.card.results import of_checkpoint
    from vllm_gemma4q.compare.comparison import of_models
    from vllm_gemma4q.compare.model import open_models
    from vllm_gemma4q.compare.results import read_results

    models = open_models([checkpoint, *(beside or [])])
    whose = "one of these models" if beside else "this checkpoint"
    results = read_results(result or [], [model.identity for model in models], whose)
    source = models[0].source
    memory = rows_of([source], [parse_engine("vllm")], Request(), contexts_of(context, source.longest))
    path = None if str(output) == "-" else output or checkpoint / CARD
    comparison = of_models(models, results, None)
    groups = comparison.drawable_beside(models[0])
    picture = path.with_suffix(".png") if path is not None and groups else None
    card = Card(
        title=title or checkpoint.resolve().name,
        manifest=manifest,
        results=of_checkpoint(results, models[0].sha256),
        memory=memory,
        base_model=base_model,
        author=author,
        licence=licence,
        picture=None if picture is None else picture.name,
        beside=[model.name for model in comparison.shown_in(groups) if model is not models[0]],
        stored=stored_in(checkpoint),
    )
    with _damaged_is_bad_input():
        text = card.markdown()
    for line in comparison.origins:
        print(f"note: {line}", file=sys.stderr)
    if path is None:
        sys.stdout.write(text)
        return
    _write(path, text.encode(), picture, lambda target: comparison.plot(groups, target))
    if beside and picture is None:
        print(
            "note: no picture: no --result has figures of two of these models beside the original, measured alike",
            file=sys.stderr,
        )
    if as_json:
        shown = None if picture is None else str(picture)
        print(json.dumps({"card": str(path), "picture": shown, "results": len(results)}))
    else:
        print(f"Wrote {path}{'' if picture is None else f' and {picture}'}.")


def _manifest(checkpoint: Path) -> dict[str, Any]:
    """What gemma4q says that it did. Raises InputError: it made no such checkpoint."""
    from vllm_gemma4q.card.card import SCHEMES

    open_checkpoint(checkpoint)
    if not (checkpoint / MANIFEST).is_file():
        raise InputError(f"{checkpoint}: has no {MANIFEST}, expected a checkpoint that gemma4q wrote")
    manifest = read_json(checkpoint / MANIFEST)
    with _damaged_is_bad_input():
        scheme = manifest["identity"]["scheme"]
        if scheme not in SCHEMES:
            raise InputError(f"{MANIFEST}: got scheme {scheme}, expected {', '.join(SCHEMES)}")
    return manifest


@contextmanager
def _damaged_is_bad_input() -> Iterator[None]:
    """The manifest is a file that anybody may have changed: what it lacks is one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{MANIFEST}: damaged: {type(error).__name__}: {error}") from error


def _write(path: Path, text: bytes, picture: Path | None, draw: Callable[[BytesIO], None]) -> None:
    """The card, and its picture first; nothing where one of them would take the place of another file."""
    files = {path: text}
    if picture is not None:
        draw(drawn := BytesIO())
        files = {picture: drawn.getvalue(), **files}
    for target, content in files.items():
        if target.exists() and target.read_bytes() != content:
            raise InputError(f"{target}: exists and is another; remove it, or choose another name with --output")
    for target, content in files.items():
        if not target.exists():
            write_file(target, content)
