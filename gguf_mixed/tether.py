"""Programs that end with the process that started them, however that ends: also killed, by SIGKILL or for memory.

`spawn` starts a program as the head of a session of its own. Beside it waits a watcher, which holds the reading end of
a pipe; the writing end is in the starting process alone, and the system closes it when that is gone. Then the watcher
kills the whole session: programs that start others, as vLLM starts its engine, leave none of them behind.

    python tether.py FD COMMAND..       what `spawn` runs: leaves the watcher, then becomes COMMAND, with the same pid

The kernel's own means, PR_SET_PDEATHSIG, is Linux's alone, is sent when the starting *thread* ends, and reaches only
the program itself. Not done: programs that leave their session.
"""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_ENDED = b"."


@contextlib.contextmanager
def spawn(command: Sequence[str], grace_seconds: float = 0, **options: Any) -> Iterator["subprocess.Popen[Any]"]:
    """Start a program; at the end of the block nothing of its session is left.

    It holds the locks of `atomic_file.exclusive` that this process holds, until it has ended.

    Args:
        grace_seconds: a program that still runs then is asked to end (SIGTERM), and has so long before it is killed.
        options: of `subprocess.Popen`.

    Raises:
        OSError: the command cannot be started.
    """
    from gguf_mixed.atomic_file import held as locks  # here, since the launcher has no packages

    program = _find(command[0])
    watched, held = os.pipe()
    try:
        launcher = [sys.executable, "-I", "-S", __file__, str(watched), program, *command[1:]]
        process = subprocess.Popen(launcher, pass_fds=[watched, *locks()], start_new_session=True, **options)
    except BaseException:
        os.close(held)
        raise
    finally:
        os.close(watched)
    try:
        yield process
    finally:
        _end(process, grace_seconds)
        with contextlib.suppress(BrokenPipeError):  # the watcher may be gone with its session
            os.write(held, _ENDED)
        os.close(held)


def _find(program: str) -> str:
    """Its path. What the system would say is said here: the launcher could only exit with a code."""
    found = shutil.which(program)
    if found is None:
        error = errno.EACCES if Path(program).is_file() else errno.ENOENT
        raise OSError(error, os.strerror(error), program)
    return found


def _end(process: "subprocess.Popen[Any]", grace_seconds: float) -> None:
    if grace_seconds and process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace_seconds)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(watched: int, command: Sequence[str]) -> None:
    """Leave a watcher and become the command."""
    session = os.getpid()
    child = os.fork()
    if child == 0:
        if os.fork() == 0:  # its parent is gone at once, so that the command has no child that it did not start
            _watch(watched, session)
        os._exit(0)
    os.waitpid(child, 0)
    os.close(watched)
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and it would be inherited
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execv(command[0], [*command])
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


def _watch(watched: int, session: int) -> None:
    """Wait for the end of the pipe, holding nothing else open; then end the session, this process with it."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.closerange(3, watched)
    os.closerange(watched + 1, os.sysconf("SC_OPEN_MAX"))
    if os.read(watched, 1) != _ENDED:
        os.killpg(session, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
