"""Finding and running llama.cpp's programs (llama-quantize, llama-imatrix, llama-perplexity) on this machine.

Order: the folder that the user names, and then nothing else; PATH; the cache folder, where
`environment/build_llama_cpp.py` of the source repository builds them.

What they print goes to two streams, read as one. Builds since 2025 print from a thread that is not awaited at exit
(`common_log_main` in common/log.cpp, llama.cpp #22142), so that a run's last lines are lost now and then: of 30 runs
that failed at once, 11 printed nothing at all. So a run that fails without a reason is asked again while that is quick,
and callers check results, not only what was printed.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gguf_mixed.errors import InputError
from gguf_mixed.tether import spawn

Log = Callable[[str], None]

_SUBFOLDERS = ("", "bin", "build/bin")
_HELP_SECONDS = 60
_ASK_AGAIN_RUNS, _ASK_AGAIN_SECONDS = 8, 10
_CHUNKS = re.compile(r"(?:compute_imatrix|perplexity): (?:computing|calculating perplexity) over (\d+) chunks")
_STAMP = re.compile(r"^\d+\.\d+\.\d+\.\d+ ")  # minutes.seconds.milliseconds.microseconds, then a level: I, W, E


def cache_folder() -> Path:
    """Where a build of our own is kept. Raises InputError: in a container, say, whose user has no home."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "gemma4q" / "llama.cpp"
    except RuntimeError as error:
        raise InputError("HOME: not set, and this user has no home folder: set HOME or XDG_CACHE_HOME") from error


def find_tool(name: str, folder: Path | None = None) -> Path:
    """Path of one of llama.cpp's programs.

    Args:
        name: such as llama-quantize.
        folder: a llama.cpp checkout, its build folder, or the folder of its programs.

    Raises:
        InputError: not found; says where it was looked for.
    """
    if folder is not None:
        found = _in_folder(name, folder)
        if found is None:
            raise InputError(f"{name}: not in {folder}, nor in bin or build/bin below it")
        return found
    on_path = shutil.which(name)
    found = Path(on_path) if on_path else _in_folder(name, cache_folder())
    if found is None:
        raise InputError(f"{name}: not on PATH and not in {cache_folder()}; name its folder with --llama-cpp DIR")
    return found


def tool_help(tool: Path) -> str:
    """What a program prints for --help: builds differ, so options are looked up there.

    Raises:
        InputError: it does not run, or tells nothing.
    """
    try:
        finished = subprocess.run(
            [tool, "--help"], capture_output=True, text=True, errors="replace", timeout=_HELP_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{tool}: does not run: {error}") from error
    text = finished.stdout + finished.stderr
    if "usage" not in text:
        raise InputError(f"{tool}: --help tells nothing: {(text.strip().splitlines() or ['no output'])[-1]}")
    return text


def inference_options(tool: Path, threads: int | None) -> list[str]:
    """Options for every program that runs a model.

    Weights are not repacked where the build knows how to leave that: on processors with AMX, b11434 faults on repacked
    quantized tensors of Gemma 3.
    """
    options = ["--no-repack"] if "--no-repack" in tool_help(tool) else []
    return options + (["--threads", str(threads)] if threads else [])


def run_tool(command: Sequence[str], log: Log, main_niceness: int = 0) -> list[str]:
    """Run a program to its end.

    Args:
        log: gets every line as it is printed, standard output and errors together.
        main_niceness: how far the program's first thread gives way to its others, 0 to 19: llama.cpp's programs leave
            the log to a thread of its own and do not wait for it when they end. On Linux only.

    Returns:
        All lines. Some programs exit with 0 after an error: see `error_line`.

    Raises:
        InputError: it does not start, or exits with another status than 0; with its own error line.
    """
    name = Path(command[0]).name
    deadline = time.monotonic() + _ASK_AGAIN_SECONDS
    for _ in range(_ASK_AGAIN_RUNS):
        try:
            status, lines = _run(command, log, main_niceness)
        except OSError as error:
            raise InputError(f"{name}: does not run: {error}") from error
        if status <= 0 or error_line(lines) or time.monotonic() > deadline:
            break
    if status:
        end = f"exit {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
        raise InputError(f"{name}: {end}: {error_line(lines) or last_line(lines)}")
    return lines


def asking_for(chunks: int, context: int, text: Path, log: Log) -> Log:
    """`log`, which also stops a run over a text when the program says, before the first chunk, that it computes fewer.

    It raises InputError: llama-imatrix and llama-perplexity take as many as there are, and call that a success.
    """

    def check(line: str) -> None:
        log(line)
        said = _CHUNKS.search(line)
        if said:
            check_chunks(int(said.group(1)), chunks, context, text)

    return check


def check_chunks(found: int, asked: int, context: int, text: Path) -> None:
    """Raises InputError: a text holds fewer chunks of `context` tokens than asked."""
    if found < asked:
        raise InputError(f"{text.name}: too small: {found} chunks of {context} tokens, asked were {asked}")


def error_line(lines: Sequence[str]) -> str | None:
    """The first line that tells of an error: of that level, else by its words. Without its time stamp."""
    messages = [line for line in lines if not line.startswith("llama_model_loader: -")]
    marked = (_STAMP.sub("", line) for line in messages if _STAMP.match(line))
    by_level = next((line.removeprefix("E ") for line in marked if line.startswith("E ")), None)
    return by_level or next((line for line in messages if re.search("fail|error|abort", line, re.I)), None)


def last_line(lines: Sequence[str]) -> str:
    """The last line that is not empty."""
    return next((line for line in reversed(lines) if line.strip()), "no output")


def _run(command: Sequence[str], log: Log, main_niceness: int) -> tuple[int, list[str]]:
    """Exit status (negative: the signal that killed it) and all lines printed."""
    lines: list[str] = []
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with spawn(command, **output, text=True, encoding="utf-8", errors="replace") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if main_niceness and not lines and sys.platform == "linux":
                _lower_main_thread(process.pid, main_niceness)
            lines.append(line.rstrip())
            log(lines[-1])
        return process.wait(), lines


def _lower_main_thread(pid: int, niceness: int) -> None:
    """Threads inherit niceness, so it is set once the others are there: when the first line has been printed."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, niceness)


def _in_folder(name: str, folder: Path) -> Path | None:
    for subfolder in _SUBFOLDERS:
        found = shutil.which(name, path=folder / subfolder)
        if found:
            return Path(found).absolute()  # "./NAME" is NAME once it is a Path, and would be looked for on PATH
    return None
