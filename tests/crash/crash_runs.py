"""Runs of a command in a folder: ended at a moment that was drawn, gone on with, and compared with an unbroken one."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# What every command needs, and takes seconds to import.
ALL = (
    "PIL.PngImagePlugin", "anyio._backends._asyncio", "anyio.streams.memory", "anyio.streams.stapled",
    "gguf_mixed.backward", "gguf_mixed.cli", "jiter", "matplotlib.backends.backend_agg", "matplotlib.figure",
    "openai.resources.chat.completions", "openai.resources.models", "scipy.optimize", "scipy.stats",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.models.gemma4.modeling_gemma4", "typer._adapters", "vllm_gemma4q.calibration.calibrate",
    "vllm_gemma4q.card.card", "vllm_gemma4q.cli", "vllm_gemma4q.commands.calibrate", "vllm_gemma4q.commands.card",
    "vllm_gemma4q.commands.compare", "vllm_gemma4q.commands.evaluate", "vllm_gemma4q.commands.prune",
    "vllm_gemma4q.commands.quantize", "vllm_gemma4q.commands.report", "vllm_gemma4q.commands.restore",
    "vllm_gemma4q.commands.sweep", "vllm_gemma4q.commands.vram", "vllm_gemma4q.compare.comparison",
    "vllm_gemma4q.evaluation.engines.transformers", "vllm_gemma4q.evaluation.gsm8k.run",
    "vllm_gemma4q.evaluation.measure", "vllm_gemma4q.evaluation.noise", "vllm_gemma4q.exl3.sweep",
    "vllm_gemma4q.exl3.sweep_plot", "vllm_gemma4q.pruned_moe.judge", "vllm_gemma4q.pruned_moe.refit",
    "vllm_gemma4q.report.facts", "vllm_gemma4q.report.render",
)  # fmt: skip
SEED = int(os.environ.get("GEMMA4Q_CRASH_SEED", "0"))
KILLS = int(os.environ.get("GEMMA4Q_CRASH_KILLS", "50"))
SERVER = Path(__file__).with_name("fork_server.py")
FEW = 4  # changes of files: then only time tells moments apart
LONGEST = 120.0  # seconds that a run may take
GONE = 20.0  # seconds in which all that a killed run started has to end
JOURNAL, TEMPORARY = ".gemma4q-run.jsonl", "gemma4q-"
Files = Mapping[str, bytes]
# One figure, or one for each step.
_SECONDS = re.compile(rb'("seconds"): (?:[\d.e+-]+|\{[^{}]*\})')


@dataclass(frozen=True)
class Case:
    """One command that writes.

    Attributes:
        arguments: what it writes has names relative to the folder it runs in, so that all runs are given the same.
        work: names of files and folders that only an unfinished run has.
        grows: files that are appended to: an unfinished one is how the finished one begins.
        unordered: files whose lines come as workers are done with them.
        replaced: files that are there before with something else in them, and are replaced.
        rewritten: JSON files that are replaced more than once.
        in_a_row: the most kills before a run is let to its end; more where that takes seconds.
    """

    name: str
    program: str
    arguments: Sequence[object]
    work: Sequence[str] = ()
    grows: Sequence[str] = ()
    unordered: Sequence[str] = ()
    replaced: Sequence[str] = ()
    rewritten: Sequence[str] = ()
    in_a_row: int = 6

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Ended:
    """A run that is over, or stopped (status None)."""

    status: int | None
    events: int
    seconds: float
    printed: str


class Server:
    """See fork_server.py; started once."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path):
        self._process = process
        self._environment = {"TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self._environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "torch")  # a cache is there to be left
        self.temporary = folder / "tmp"
        self.temporary.mkdir()

    def check_nothing_left(self, folder: Path, told: str = "") -> None:
        """Assert that runs in a folder, ended or killed a moment ago, leave neither temporary files nor processes."""
        end = time.monotonic() + GONE
        while (left := self._left(folder)) and time.monotonic() < end:
            time.sleep(0.005)
        assert not left, (left, told)

    def _left(self, folder: Path) -> list[str]:
        """Names of temporary files, and command lines of programs that have the runs' environment."""
        setting = f"TMPDIR={self.temporary}".encode()
        within = [path for path in _entries(folder) if path.name.startswith(TEMPORARY)]
        for place in _entries(folder):
            within += [path for path in _entries(place) if path.name.startswith(TEMPORARY) and path.is_dir()]
        found = [path.name for path in [*self.temporary.iterdir(), *within] if not _is_trial(path)]
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if any(each.startswith(setting) for each in (process / "environ").read_bytes().split(b"\0")):
                    found.append((process / "cmdline").read_text().replace("\0", " "))
        return found

    def start(
        self, case: Case, folder: Path, at: int | None = None, number: int = signal.SIGKILL, **options: Any
    ) -> int:
        request = {
            "program": case.program,
            "arguments": list(map(str, case.arguments)),
            "folder": str(folder),
            "environment": self._environment,
            "at": at,
            "signal": int(number),
            "file_bytes": None,
        }
        return int(self._ask("start", **{**request, **options})["pid"])

    def wait(self, pid: int, seconds: float = LONGEST) -> Ended:
        return Ended(**self._ask("wait", pid=pid, seconds=seconds))

    def run(self, case: Case, folder: Path, seconds: float = LONGEST, **options: Any) -> Ended:
        return self.wait(self.start(case, folder, **options), seconds)

    def go_on(self, pid: int) -> None:
        self._ask("continue", pid=pid)

    def _ask(self, what: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"do": what, **request}), file=self._process.stdin, flush=True)
        return dict(json.loads(self._process.stdout.readline()))


def _entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing in a file, or where a killed run's watcher removes the folder meanwhile."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return list(folder.iterdir())
    return []


def _is_trial(path: Path) -> bool:
    """A file by which Python itself finds out whether a folder for temporary files can be written."""
    with contextlib.suppress(OSError):
        return path.is_file() and path.read_bytes() in (b"", b"bl", b"blat")
    return False


@contextlib.contextmanager
def serving(folder: Path, *imported: str) -> Iterator[Server]:
    """A server; `imported` are modules that are in no run's time then."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = f"{SERVER.parent}{os.pathsep}{environment.get('PYTHONPATH', '')}"  # for stub_engine
    for name in ("EVAL_BASELINE_JSON", "EVAL_QUANT_JSON", "OPENAI_API_KEY"):
        environment.pop(name, None)
    command = [sys.executable, SERVER, *imported]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"ready": True}
        yield Server(process, folder)
        assert process.stdin is not None
        process.stdin.close()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every empty folder. Of results, what was measured, and not in which time."""
    while True:
        with contextlib.suppress(FileNotFoundError):  # a killed run's watcher removes something meanwhile
            return _snapshot(folder)


def _snapshot(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file():
            found[name] = path.read_bytes()
            if path.name == "results.json":
                found[name] = _SECONDS.sub(rb"\1: 0", found[name])
        elif not any(path.iterdir()):
            found[f"{name}/"] = b""
    return found


def make(folder: Path, case: Case) -> Path:
    """The folder that a case runs in, with what is there before."""
    folder.mkdir()
    for name in case.replaced:
        (folder / name).write_bytes(b"what was here before")
    return folder


def must_succeed(ended: Ended) -> Ended:
    assert ended.status == 0, ended
    return ended


@dataclass
class Campaign:
    """Kills of one command, and what came of them."""

    server: Server
    case: Case
    folder: Path
    seed: int
    kills: int = 0
    finished: int = 0
    expected: Files = field(default_factory=dict)
    moments: list[str] = field(default_factory=list)

    def run(self, wanted: int) -> None:
        """Kill `wanted` times, once or more often before a run is let to its end."""
        generator = random.Random(f"{self.seed} {self.case}")
        whole = make(self.folder / "whole", self.case)
        first = must_succeed(self.server.run(self.case, whole))
        again = must_succeed(self.server.run(self.case, make(self.folder / "warm", self.case)))
        self.expected, unbroken = self._snapshot(whole), replace(first, seconds=min(first.seconds, again.seconds))
        check_same(self._snapshot(self.folder / "warm"), self.expected)
        self.server.check_nothing_left(whole)
        while self.kills < wanted:
            folder = make(self.folder / f"run-{self.finished}", self.case)
            times = generator.randint(1, self.case.in_a_row)
            if all(self._kill(folder, unbroken, generator) for _ in range(times)):
                ended = self._run(folder)
                assert ended.status == 0, (ended, self.told())
            self._check_finished(folder)
            shutil.rmtree(folder)

    def _kill(self, folder: Path, unbroken: Ended, generator: random.Random) -> bool:
        """False: it was quicker than the moment, or had fewer changes left, and is finished."""
        if self.kills % 2 or unbroken.events < FEW:
            moment: dict[str, Any] = {"seconds": generator.uniform(0, unbroken.seconds)}
        else:
            moment = {"at": generator.randint(1, unbroken.events)}
        self.moments.append(f"{moment}")
        ended = self._run(folder, **moment)
        if ended.status == -signal.SIGKILL:
            self.kills += 1
            check_unfinished(self.case, folder, self.expected, self.told())
            return True
        assert ended.status == 0, (ended, self.told())
        return False

    def _run(self, folder: Path, **moment: Any) -> Ended:
        """Tried again while a killed run has a child that holds its lock, being about to become a program."""
        end = time.monotonic() + GONE
        while (ended := self.server.run(self.case, folder, **moment)).status == 2 and time.monotonic() < end:
            if not self.moments or "another run is writing here" not in ended.printed:
                break
        return ended

    def _check_finished(self, folder: Path) -> None:
        self.server.check_nothing_left(folder, self.told())
        check_same(self._snapshot(folder), self.expected, self.told())
        self.finished += 1
        self.moments.clear()

    def _snapshot(self, folder: Path) -> Files:
        return {
            name: b"".join(sorted(content.splitlines(keepends=True))) if name in self.case.unordered else content
            for name, content in snapshot(folder).items()
        }

    def told(self) -> str:
        """Where a failure was: enough to have it again."""
        return f"{self.case}, seed {self.seed}, kill {self.kills}, run {self.finished} after {', '.join(self.moments)}"


def _is_temporary(name: str) -> bool:
    """A file of that name, or one in a folder of that name: manifests begin alike."""
    *folders, _ = name.split("/")
    return name.startswith(TEMPORARY) or any(folder.startswith(TEMPORARY) for folder in folders)


def check_same(found: Files, expected: Files, told: str = "") -> None:
    """Assert that two folders hold the same, and say what differs instead of printing it."""
    others = sorted(found.keys() ^ expected.keys())
    assert not others, (others, told)
    differing = [name for name in expected if found[name] != expected[name]]
    assert not differing, (differing, told)


def check_unfinished(case: Case, folder: Path, expected: Files, told: str) -> None:
    """Whatever has its final name is whole, so that nobody can take an unfinished file for a finished one."""
    found = snapshot(folder)
    for name, content in found.items():
        if name.endswith((".partial", ".partial.gguf", JOURNAL, "/")):
            continue
        if _is_temporary(name) or name in case.work or name.split("/")[0] in case.work:
            continue
        if name in case.replaced and content == b"what was here before":
            continue
        if name in case.grows:
            assert expected[name].startswith(content), (name, told)
        elif name in case.unordered:
            lines = expected[name].splitlines(keepends=True)
            assert all(line in lines for line in content.splitlines(keepends=True) if line.endswith(b"\n")), (
                name,
                told,
            )
        elif name in case.rewritten:
            json.loads(content)
        else:
            assert name in expected, (name, told)
            assert content == expected[name], (name, told)
    for name in found:
        if Path(name).name == "config.json":  # then an engine would load it
            within = {key for key in expected if Path(key).parent == Path(name).parent}
            assert within <= found.keys(), told
