"""Run a command and learn its peak resident memory, whatever the size of the process that asks.

Linux counts what a process held before exec as its own: a child forked by a large process starts with the
parent's peak. So the command is started by a small Python, which this file is too:

    python peak_memory.py COMMAND ARGUMENTS..      prints JSON on the last line of stdout
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """What the operating system says of a finished process."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def measure(command: Sequence[str | Path]) -> Usage:
    """Run a command to its end; its output is discarded.

    Raises:
        RuntimeError: it failed; the message is the end of its stderr.
    """
    line = [sys.executable, "-S", __file__, *map(str, command)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return Usage(**json.loads(done.stdout.splitlines()[-1]))


def _main(command: list[str]) -> int:
    started = time.perf_counter()
    pid = os.posix_spawn(
        command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]
    )
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    result = {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}
    print(json.dumps(result))
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
