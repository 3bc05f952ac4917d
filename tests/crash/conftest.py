"""What all crash tests share: inputs, a chat server, and a process that forks runs of both commands."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_cases import CASES, cases, write_converted, write_inputs
from crash_runs import ALL, Case, Server, serving
from gsm8k_server import Chat
from gsm8k_server import serving as chatting

ENOUGH = 1 << 30


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all inputs."""
    return write_inputs(tmp_path_factory.mktemp("crash"))


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """With a name that leaves room for that of a socket: else the temporary files of runs are elsewhere."""
    with tempfile.TemporaryDirectory(prefix="crash-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with short_folder() as folder, serving(folder, *ALL) as server:
        yield server


@pytest.fixture(scope="session")
def light_server() -> Iterator[Server]:
    """For few runs: nothing is imported that they may not need."""
    with short_folder() as folder, serving(folder, "vllm_gemma4q.commands.quantize", "gguf_mixed.cli") as server:
        yield server


@pytest.fixture(scope="session")
def known(made: Path) -> Iterator[dict[str, Case]]:
    """Every case by its name."""
    with chatting(Chat()) as url:
        yield {case.name: case for case in cases(made, url)}


@pytest.fixture(scope="session")
def converted(made: Path) -> None:
    """What only slow tests need, by llama.cpp's programs, which `make test-slow` builds."""
    write_converted(made)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, known: dict[str, Case], converted: None) -> Case:
    return known[request.param]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where runs are: in memory if that can be, since a disk takes 10 ms to say that a file is on it."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < ENOUGH:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="crash-", dir=memory) as folder:
        yield Path(folder)
