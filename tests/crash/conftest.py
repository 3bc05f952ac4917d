"""What all crash tests share: inputs, a chat server, and a process that forks runs of both commands."""

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


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), *ALL) as server:
        yield server


@pytest.fixture(scope="session")
def light_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """For few runs: nothing is imported that they may not need."""
    with serving(tmp_path_factory.mktemp("light"), "vllm_gemma4q.commands.quantize", "gguf_mixed.cli") as server:
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
