"""`gemma4q` run in this process, on one thread."""

from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from vllm_gemma4q import cli
from vllm_gemma4q.errors import InputError


def _run(arguments: tuple[Any, ...]) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = CliRunner().invoke(cli.application(), list(map(str, arguments)))
    torch.set_num_threads(threads)
    return found


def gemma4q(*arguments: Any) -> str:
    """What it prints on stdout. On stderr nothing may be: nobody watches."""
    found = _run(arguments)
    assert found.exit_code == 0, (found.output, found.exception)
    assert "token layer" not in found.stderr
    return str(found.stdout)


def refused(*arguments: Any) -> str:
    """The one line that a user would see."""
    found = _run(arguments)
    assert isinstance(found.exception, InputError), (found.output, found.exception)
    line = str(found.exception)
    assert "\n" not in line
    assert not found.stdout
    return line


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
