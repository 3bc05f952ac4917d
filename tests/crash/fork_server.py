"""Runs of both commands, each in a fork of this process, which has imported what they need: a run takes no start-up.

    python fork_server.py MODULE..             modules to import before the first run

    {"do": "start", "program": .., "arguments": [..], "folder": .., "environment": {..}, "at": N, "signal": S,
     "file_bytes": N}                          -> {"pid": ..}
    {"do": "wait", "pid": .., "seconds": S}    -> {"status": .., "events": .., "seconds": .., "printed": ..}
    {"do": "continue", "pid": ..}              -> {}

One JSON object a line. A run is the head of a process group and gets `signal` just before the Nth time that it is about
to change a file: to open one for writing, rename, remove, truncate or flush it, to make or remove a folder; of the Nth
`os.write`, half is written first. `file_bytes` limits the size of files. `wait` kills the group after so many seconds;
`status` is the exit code, less than nothing for a signal, None while the run is stopped.
"""

import atexit
import contextlib
import fcntl
import gc
import io
import json
import mmap
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from importlib import import_module
from typing import Any

import quick
import torch

_PROGRAMS = {"gemma4q": "vllm_gemma4q.cli", "gguf-mixed": "gguf_mixed.cli"}
_AUDITED = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"})
_MOST_PRINTED = 1 << 20
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Runs:
    """What was started, by process id."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[float, mmap.mmap, int]] = {}

    def start(self, request: dict[str, Any]) -> dict[str, Any]:
        events = mmap.mmap(-1, 8)
        began = time.perf_counter()
        ours, theirs = os.pipe()  # and no file, which a limit on sizes would be a limit of
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, _MOST_PRINTED)
        pid = os.fork()
        if not pid:
            os._exit(_run(request, events, theirs))
        os.close(theirs)
        with contextlib.suppress(OSError):  # done by both, since neither knows who comes first
            os.setpgid(pid, pid)
        self._known[pid] = began, events, ours
        return {"pid": pid}

    def wait(self, request: dict[str, Any]) -> dict[str, Any]:
        pid = request["pid"]
        began, events, pipe = self._known[pid]
        end = time.perf_counter() + request["seconds"]
        found, status = os.waitpid(pid, os.WUNTRACED | os.WNOHANG)
        while not found:
            if time.perf_counter() > end:
                os.killpg(pid, signal.SIGKILL)
                found, status = os.waitpid(pid, 0)
                break
            time.sleep(0.0005)
            found, status = os.waitpid(pid, os.WUNTRACED | os.WNOHANG)
        seconds, count = time.perf_counter() - began, int.from_bytes(events[:], "little")
        if os.WIFSTOPPED(status):
            return {"status": None, "events": count, "seconds": seconds, "printed": ""}
        del self._known[pid]
        os.set_blocking(pipe, False)
        with os.fdopen(pipe, "rb") as file:
            printed = (file.read() or b"").decode(errors="replace")
        return {
            "status": os.waitstatus_to_exitcode(status), "events": count, "seconds": seconds, "printed": printed,
        }  # fmt: skip

    def resume(self, request: dict[str, Any]) -> dict[str, Any]:
        os.killpg(request["pid"], signal.SIGCONT)
        return {}


def _run(request: dict[str, Any], events: mmap.mmap, output: int) -> int:
    """Exit code."""
    os.setpgid(0, 0)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    if request["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], resource.RLIM_INFINITY))
    _count(request["at"], request["signal"], events)
    sys.argv = [request["program"], *request["arguments"]]
    code = 0
    try:
        import_module(_PROGRAMS[request["program"]]).main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _count(at: int | None, number: int, events: mmap.mmap) -> None:
    """Count changes of files from now on, and send the signal before the one that was drawn."""
    held, count, run = threading.Lock(), 0, os.getpid()

    def due() -> bool:
        nonlocal count
        if os.getpid() != run:  # a worker, whose changes come in no order
            return False
        with held:
            count += 1
            events[:] = count.to_bytes(8, "little")
            return count == at

    def happen() -> None:
        os.killpg(0, number) if number == signal.SIGKILL else os.kill(os.getpid(), number)

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            changes = bool(flags & _WRITING) and not str(path).startswith(("/dev/", "/proc/"))
            changes = changes and (mode is None or set(mode) & set("wax+") != set())
        else:
            changes = event in _AUDITED
        if changes and due():
            happen()

    def before(call: Callable[..., Any], halves: bool) -> Callable[..., Any]:
        def called(descriptor: int, *arguments: Any) -> Any:
            try:
                if due():
                    if halves:
                        call(descriptor, memoryview(arguments[0]).cast("B")[: len(arguments[0]) // 2], *arguments[1:])
                    happen()
                return call(descriptor, *arguments)
            finally:
                del arguments  # or the traceback of a full disk would keep a buffer from being closed

        return called

    os.fsync = before(os.fsync, halves=False)
    kills = number == signal.SIGKILL
    os.write, os.pwrite = before(os.write, halves=kills), before(os.pwrite, halves=kills)
    sys.addaudithook(audited)


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        import_module(name)
    if any("matplotlib" in name for name in sys.argv[1:]):
        _draw()
        quick.patch()
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False  # torch takes its library apart: 50 ms a run
    gc.collect()
    gc.freeze()  # collections in runs would copy all that was imported
    runs = Runs()
    actions = {"start": runs.start, "wait": runs.wait, "continue": runs.resume}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(actions[request["do"]](request)), file=answers, flush=True)


def _draw() -> None:
    """What takes a second in its first use: fonts, and mathematical text, which logarithmic axes have."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.plot([1, 2, 3], [1e-4, 1, 1e4], label="fonts")
    axes.set_title("fonts")
    axes.legend()
    FigureCanvasAgg(figure)
    figure.savefig(io.BytesIO(), format="png")


if __name__ == "__main__":
    main()
