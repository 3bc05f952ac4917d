"""Temporary files that go with the process that made them, however that ends: also killed, by SIGKILL or for memory.

Beside the process waits a shell, in a session of its own, at the end of a pipe that this process alone holds. A line
from it says that all went well; where the pipe ends without one, the process is gone, and the shell removes what it
left. It tries again while a program that the process started, and that ends with it (`tether`), still writes there.

Not done: what a power failure leaves, or a kill of everything at once, as when a container is stopped.
"""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from gguf_mixed.atomic_file import refusals

_PREFIX, _RANDOM = "gemma4q-", 12
NAME_LENGTH = len(_PREFIX) + _RANDOM  # of a folder by `temporary_folder`: paths of sockets in it must be short
_SHELL = "/bin/sh"
_WATCH = 'read -r ended || for second in 1 2 3 4 5 6 7 8 9; do rm -rf -- "$1" && break; sleep 1; done'


@contextlib.contextmanager
def removed_if_killed(path: Path) -> Iterator[None]:
    """A file or folder that is removed when this process ends within the block; else it is the block's to remove."""
    command = [_SHELL, "-c", _WATCH, _SHELL, str(path.absolute())]
    with subprocess.Popen(
        command,
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    ) as watcher:
        assert watcher.stdin is not None
        try:
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):  # nobody's to kill, but then it is gone
                watcher.stdin.write(b"\n")


@contextlib.contextmanager
def temporary_folder(prefix: str = _PREFIX, place: Path | None = None) -> Iterator[Path]:
    """An empty folder that is gone after the block.

    Args:
        place: the folder that it is made in; None for the system's.

    Raises:
        WriteError: it cannot be made.
    """
    folder = (place or Path(tempfile.gettempdir())) / f"{prefix}{uuid4().hex[:_RANDOM]}"
    with removed_if_killed(folder):  # before it is there, so that it is never without
        with refusals(folder):
            folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
