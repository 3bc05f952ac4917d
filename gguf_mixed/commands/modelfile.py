"""`gguf-mixed modelfile OUT.gguf`"""

from pathlib import Path
from typing import Annotated

import typer

from gguf_mixed.ollama import modelfile
from gguf_mixed.tensors import read_inventory


def command(
    model: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The model that Ollama should serve.")],
) -> None:
    """Print an Ollama Modelfile for a Gemma 4 GGUF, to be saved beside it."""
    print(modelfile(read_inventory(model)), end="")
