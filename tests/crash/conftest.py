"""What all crash tests share: inputs, a chat server, and a process that forks runs of both commands."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_cases import CASES, cases, write_inputs
from crash_runs import ALL, Case, Server, serving
from gsm8k_server import Chat
from gsm8k_server import serving as chatting


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


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, known: dict[str, Case]) -> Case:
    return known[request.param]
