"""README and docs, followed by a newcomer: every command line they print is run, in their order, on small models.

`vllm serve` lines are not run here, since other tests serve each of these checkpoints: what they would serve has to be
there, and `gemma4q doctor` has to say that vLLM loads it.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from docs.documented_commands import NOT_RUN, ON_A_SMALL_MODEL, PAGES, Line, damage, documented_lines

LINES = documented_lines()
BIN = Path(sys.executable).parent
QUICK_VLLM = {"VLLM_CPU_CI_ENV": "1"}  # graphs are traced, not compiled


def run(folder: Path, command: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **QUICK_VLLM, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-euc", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.usefixtures("few_vllm_processes")
@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.page}: {line.text[:60]}")
def test_runs_as_printed(line: Line, reader_folder: Path) -> None:
    command = line.on_small_model
    if command.startswith("vllm serve"):
        command = f"gemma4q doctor {shlex.split(command)[2]} --device cpu"
    if command.startswith("gemma4q restore"):
        damage(reader_folder)
    finished = run(reader_folder, command)
    assert finished.returncode == 0, f"{command}\n{finished.stdout[-2000:]}\n{finished.stderr[-2000:]}"


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_what_is_left_out_is_still_documented(pattern: str) -> None:
    import re

    assert any(re.search(rf"^{pattern}", page.read_text(), re.MULTILINE) for page in PAGES)


@pytest.mark.parametrize("documented", ON_A_SMALL_MODEL)
def test_every_stand_in_is_used(documented: str) -> None:
    assert any(documented in line.text for line in LINES)
