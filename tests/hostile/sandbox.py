"""Give hostile files to a reader in forked children, and say what became of each.

A child is forked from a process that has everything imported already, and reads file after file until it dies or is
done. For each file it may take 5 seconds and 500 MB of address space more than it had, and write below one folder.
What it does is watched from inside (Python's audit events: files opened for writing, removed or renamed, processes
started, sockets, unpickling, code compiled from a hostile file) and from outside (the folder before and after).
"""

import contextlib
import io
import json
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 5.0
MEGABYTES = 500
REFUSED = 2
_STATEMENT_BYTES = 3000
_FAILED = 70

# Reads the files in a folder, and may write to a second one; returns an exit code as commands do.
Reader = Callable[[Path, Path], int]
# Writes the hostile files of one case into a folder.
Writer = Callable[[Path], None]

_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.getaddrinfo",
              "pickle.find_class", "os.fork", "os.kill")  # fmt: skip
_CHANGING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


@dataclass(frozen=True)
class Case:
    """One hostile input: `number` repeats it."""

    number: int
    write: Writer
    read: Reader


@dataclass(frozen=True)
class Outcome:
    """What became of it: the exit code, and what was wrong about it, None where nothing was."""

    number: int
    code: int | None
    problem: str | None
    said: str = ""


def run_all(cases: Sequence[Case], folder: Path) -> Iterator[Outcome]:
    """Every case's outcome, in order. A case that seems to hang is tried once more, alone."""
    left = list(cases)
    while left:
        done, ended = _batch(left, folder)
        yield from done
        left = left[len(done) :]
        if left and ended == signal.SIGALRM:
            again, ended = _batch(left[:1], folder)
            yield from again or [_killed(left[0], ended)]
            left = left[1:]
        elif left:
            yield _killed(left[0], ended)
            left = left[1:]


def _killed(case: Case, number: int) -> Outcome:
    if number == signal.SIGALRM:
        return Outcome(case.number, None, f"hang: more than {SECONDS:g} s")
    return Outcome(
        case.number, None, f"crash: the process ended by {signal.Signals(number).name if number else 'itself'}"
    )


def _batch(cases: Sequence[Case], folder: Path) -> tuple[list[Outcome], int]:
    """Outcomes up to the case that ended the process, and the signal that did.

    Raises:
        RuntimeError: a case could not be written, or this module is at fault.
    """
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        _child(cases, folder, sending)
    os.close(sending)
    content = _read_all(receiving)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == _FAILED:
        raise RuntimeError(f"the sandbox failed: {content}")
    done = [Outcome(**json.loads(line)) for line in content.splitlines()]
    return done, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _read_all(descriptor: int) -> str:
    parts = []
    while True:
        select.select([descriptor], [], [])
        part = os.read(descriptor, 1 << 16)
        if not part:
            os.close(descriptor)
            return b"".join(parts).decode()
        parts.append(part)


def _child(cases: Iterable[Case], folder: Path, sending: int) -> None:
    """Never returns."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    watch = _Watch(folder)
    sys.addaudithook(watch.event)
    try:
        for case in cases:
            outcome = _run(case, folder, watch)
            os.write(sending, json.dumps(vars(outcome)).encode() + b"\n")
    except BaseException:
        os.write(sending, traceback.format_exc().encode())
        os._exit(_FAILED)
    os._exit(0)


class _Watch:
    """What a reader does to the world. `problem` is the first thing that it must not do."""

    def __init__(self, folder: Path) -> None:
        self.hostile, self.target = str(folder / "in"), str(folder / "out")
        self.active, self.problem = False, ""

    def event(self, name: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if name == "open":
            path, mode, flags = arguments
            if isinstance(path, (str, bytes)) and _is_writing(mode, flags):
                self._check_target(name, path)
        elif name in _CHANGING:
            for path in arguments[: 2 if name in ("os.rename", "os.link") else 1]:
                self._check_target(name, path)
        elif name in _FORBIDDEN:
            self.problem = self.problem or f"{name} {arguments[:2]!r}"
        elif name == "compile" and arguments[1] and os.fsdecode(arguments[1]).startswith(self.hostile):
            self.problem = self.problem or f"compiles {arguments[1]!r}"

    def _check_target(self, what: str, path: Any) -> None:
        if isinstance(path, int):
            return
        absolute = os.path.realpath(os.fsdecode(path))
        if not absolute.startswith(self.target + os.sep) and absolute not in (self.target, os.devnull):
            self.problem = self.problem or f"{what} outside of the target: {absolute}"


def _is_writing(mode: Any, flags: int) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))


def _run(case: Case, folder: Path, watch: _Watch) -> Outcome:
    _empty(folder / "in")
    _empty(folder / "out")
    case.write(folder / "in")
    before = _listing(folder / "in")
    os.chdir(folder / "out")
    stdout, stderr = _Stream("strict"), _Stream("backslashreplace")
    code, problem = None, None
    watch.active, watch.problem = True, ""
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), _limited():
        try:
            code = case.read(folder / "in", folder / "out")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException as error:
            problem = f"crash: {_where(error)}"
    watch.active = False
    said = stderr.text()
    problem = problem or watch.problem or _wrong_answer(code, stdout.text(), said)
    if not problem and _listing(folder / "in") != before:
        problem = "changed what it read"
    left = sorted(str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*"))
    if not problem and left and (code == REFUSED or any(name.endswith(".partial") for name in left)):
        problem = f"left behind: {left[:5]}"
    return Outcome(case.number, code, problem, said[-300:])


def _wrong_answer(code: int | None, stdout: str, stderr: str) -> str | None:
    """What is wrong about how a reader answers: a refusal is one printable line."""
    if code == REFUSED:
        lines = stderr.splitlines()
        if len(lines) != 1 or not lines[0].startswith("error: "):
            return f"a refusal of {len(lines)} lines: {stderr[:300]!r}"
        if not lines[0].isprintable():
            return f"a refusal that is not printable: {stderr[:300]!r}"
        if len(stderr) > _STATEMENT_BYTES:
            return f"a refusal of {len(stderr)} characters: {stderr[:200]!r}"
        if stdout:
            return f"a refusal that prints to stdout: {stdout[:200]!r}"
    elif code not in (0, 1):
        return f"exit code {code}: {stderr[:300]!r}"
    hostile = [character for character in stdout if not (character.isprintable() or character in "\n\t")]
    return f"prints control characters: {hostile[:5]!r}" if hostile else None


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "hostile" not in frame.filename]
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in ours[-4:]]
    return f"{type(error).__name__}: {str(error)[:200]} at {' < '.join(reversed(places))}"


class _Stream(io.TextIOWrapper):
    """A pipe's worth of text."""

    def __init__(self, errors: str) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """An alarm, and an end to the address space."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEGABYTES * 1_000_000, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _address_space() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123  (quicker, and every case does it)
        return int(file.read().split()[0]) * resource.getpagesize()


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    found = []
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        found.append((str(path), state.st_size, state.st_mtime_ns))
    return found


def _empty(folder: Path) -> None:
    if folder.is_dir():
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    else:
        folder.mkdir(parents=True)
