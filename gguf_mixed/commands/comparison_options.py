"""Options of a comparison by llama-perplexity, shared by the commands that take them, and how they print."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from gguf_mixed.perplexity import DEFAULT_CONTEXT, Divergence
from gguf_mixed.temporary import temporary_folder

DEFAULT_CHUNKS = 16

Chunks = Annotated[int, typer.Option(min=1, help="Parts of the text to compare on, from its start.")]
Context = Annotated[int, typer.Option(min=2, help="Tokens of a part; the later half of each is compared.")]
BaseFile = Annotated[
    Path | None,
    typer.Option("--base", metavar="FILE", help="Keeps the reference's predictions; reused where it fits."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; llama.cpp's choice where not given.")]
LlamaCpp = Annotated[Path | None, typer.Option(metavar="DIR", help="Use the llama.cpp in here.")]

HEADINGS = ("mean KLD, nats", "99%", "same top")
CONTEXT = DEFAULT_CONTEXT


def cells(found: Divergence) -> tuple[str, str, str]:
    """What `HEADINGS` say of a comparison."""
    return (
        f"{found.mean_kld:.4f} ±{found.mean_kld_error:.4f}",
        f"{found.p99_kld:.3f}",
        f"{found.same_top:.1%}",
    )


@contextmanager
def base_path(given: Path | None) -> Iterator[Path]:
    """The file that the user names, else one in a temporary folder that is removed at the end."""
    if given is not None:
        yield given
        return
    with temporary_folder("gguf-mixed-") as folder:
        yield folder / "base.kld"
