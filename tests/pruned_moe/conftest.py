"""Text that the small mixture was trained on, and text that it was not, for tests that run it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prune_commands import gemma4q
from prune_files import EXAMPLE

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from small_gemma4 import corpus


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(corpus.training_sections()))
    return path


@pytest.fixture(scope="session")
def held_out(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("held_out") / "held_out.txt"
    path.write_text("\n\n".join(corpus.held_out_sections()))
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and lose much where a core is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def statistics_file(text, held_out, tmp_path_factory) -> Path:
    """Of the small mixture, as the command writes it; two classes."""
    path = tmp_path_factory.mktemp("statistics") / "statistics.safetensors"
    texts = ["--text", text, "--text", held_out]
    gemma4q("calibrate", EXAMPLE, path, *texts, "--samples", 8, "--max-length", 96)
    return path
