"""A machine whose environment names a proxy that leads nowhere: our own server is reached, another is not."""

import socket
import sys
from pathlib import Path

import pytest
from gsm8k_server import COUNT, Chat, serving

from vllm_gemma4q.evaluation import server

HERE = Path(__file__).resolve().parent
DENSE = HERE.parents[1] / "examples" / "small_gemma4" / "dense"
SERVE = f"""#!{sys.executable}
import sys, time
sys.path.insert(0, {str(HERE)!r})
from gsm8k_server import Chat, serving
with serving(Chat(models=("model",)), int(sys.argv[sys.argv.index("--port") + 1])):
    time.sleep(600)
"""


@pytest.fixture
def closed_port():
    """One that nobody listens at while the test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture(autouse=True)
def proxy(closed_port, monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port}")


def test_a_server_of_our_own(gsm8k, files, tmp_path, monkeypatch):
    """In place of vLLM's a small one; how it is started, waited for and asked is the command's own."""
    program = tmp_path / "vllm"
    program.write_text(SERVE)
    program.chmod(0o700)
    monkeypatch.setattr(server, "_vllm", lambda: str(program))
    monkeypatch.setattr(server, "READY_TIMEOUT_SECONDS", 15)
    code, found, err = gsm8k(DENSE, *files, "--results", tmp_path / "r", "--retries", 0, "--json")
    assert (code, err) == (0, "")
    assert found["strict"]["correct"] == COUNT


def test_another_server_is_reached_through_the_proxy(gsm8k, files, tmp_path):
    with serving(Chat()) as url:
        code, _, err = gsm8k("--url", url, *files, "--results", tmp_path / "r", "--retries", 0)
        assert code == 2 and err.startswith(f"error: {url}: no connection (")
