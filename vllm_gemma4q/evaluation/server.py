"""Run `vllm serve` on a checkpoint for as long as a measurement takes.

All its processes end when the block is left, and when this process is gone, killed or not: see `gguf_mixed.tether`.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf_mixed.temporary import NAME_LENGTH, temporary_folder
from gguf_mixed.tether import spawn
from vllm_gemma4q.errors import InputError

MODEL_NAME = "model"
READY_TIMEOUT_SECONDS = 1800
_GRACE_SECONDS = 30
_NO_REASON = ("Engine core initialization failed", "EngineDeadError")
_PROCESS = re.compile(r"^\(\w+ pid=\d+\) (?:[A-Z]+ [\d-]+ [\d:]+ \[[^]]+\] ?)?")  # before what vLLM's processes print
# On a CPU, vLLM would reserve most of the machine's memory for the KV cache. A user's own setting wins.
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
_LONGEST_FOLDER = 70  # characters: Unix allows 107 for a socket, whose own name has 37
_SHORT = Path("/tmp")
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy of the environment leads here


@dataclass(frozen=True)
class Server:
    """A running server: `url` ends in `/v1`, `command` is what a user would type, `log` what it printed."""

    url: str
    command: tuple[str, ...]
    log: Path


@contextlib.contextmanager
def serve(checkpoint: Path, flags: Sequence[str], log: Path) -> Iterator[Server]:
    """Serve `checkpoint` on a free local port under the name `model` until the block is left.

    Args:
        flags: of `vllm serve`, beside the port and the name.
        log: file that receives the server's output.

    Raises:
        InputError: `vllm` is not installed, or the server died or was not ready in time; names the log.
    """
    port = _free_port()
    command = ("vllm", "serve", str(checkpoint), "--port", str(port), "--served-model-name", MODEL_NAME, *flags)
    with (
        engine_folder() as folder,
        log.open("wb") as output,
        spawn(
            [_vllm(), *command[1:]],
            _GRACE_SECONDS,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=engine_environment(folder),
        ) as process,
    ):
        _wait_until_ready(process, port, log)
        yield Server(f"http://127.0.0.1:{port}/v1", command, log)


@contextlib.contextmanager
def engine_folder() -> Iterator[Path]:
    """A folder for what vLLM's processes leave where they are killed, sockets and more; gone after the block.

    In /tmp where the system's own temporary folder has too long a name for sockets.
    """
    place = Path(tempfile.gettempdir())
    too_long = len(str(place)) + 1 + NAME_LENGTH > _LONGEST_FOLDER
    with temporary_folder(place=_SHORT if too_long and os.access(_SHORT, os.W_OK) else place) as folder:
        yield folder


def engine_environment(folder: Path) -> dict[str, str]:
    """Of vLLM's processes, whose temporary files are in `folder`, unless its name is too long for sockets.

    What torch compiles lies in the system's folder for temporary files, to be used again.
    """
    if len(str(folder)) > _LONGEST_FOLDER:
        return {**CPU_ENVIRONMENT, **os.environ}
    kept = {"TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir(), f"torchinductor_uid_{os.getuid()}"))}
    return {**CPU_ENVIRONMENT, **kept, **os.environ, "TMPDIR": str(folder)}


def _vllm() -> str:
    """The `vllm` of the running Python, before any other on PATH."""
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise InputError("command vllm: not found, expected an installed vLLM")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise InputError(f"vllm serve: exited with code {process.returncode}; last error: {last_error(log)}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            _DIRECTLY.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(0.5)
    raise InputError(f"vllm serve: not ready after {READY_TIMEOUT_SECONDS} s; see {log}")


def last_error(log: Path) -> str:
    """The line of the log that says what went wrong: a compiler's, else a traceback's last line, else the log's."""
    lines = [_PROCESS.sub("", line) for line in log.read_text(errors="replace").splitlines() if line.strip()]
    compilers = [index for index, line in enumerate(lines) if " fatal error: " in line]
    errors = compilers or [index for index, line in enumerate(lines) if "Error" in line and not _names_no_reason(line)]
    if not errors:
        return f"{(lines or ['nothing printed'])[-1].strip()} (see {log})"
    found = lines[errors[-1]].strip()
    if "validation error" in found:  # pydantic's, whose reason is on the next line
        found = " ".join([found, *lines[errors[-1] + 1 : errors[-1] + 2]]).partition(" [type=")[0]
    return f"{' '.join(found.split())} (see {log})"


def _names_no_reason(line: str) -> bool:
    return any(said in line for said in _NO_REASON) or line.lstrip().startswith("raise ")
