"""Programs that are started for a measurement end with it, also when the measuring process is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gguf_mixed.atomic_file import exclusive, held
from gguf_mixed.tether import spawn

CLIENT = Path(__file__).with_name("killed_client.py")
MODEL = Path(__file__).resolve().parents[2] / "examples" / "small_gemma4" / "dense"
# A program with a child of its own, which it leaves alone; both keep running when nothing ends them.
PROGRAM = ["/bin/sh", "-c", "sleep 600 & echo pids $$ $!; wait"]
SECONDS = 20


def is_running(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_ended(processes):
    deadline = time.monotonic() + SECONDS
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [process for process in processes if is_running(process)]


def kill_client(*arguments, ready):
    """Start a client, kill it when it has said `ready`; its descendants before that."""
    client = subprocess.Popen([sys.executable, CLIENT, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        said = next(line for line in client.stdout if line.startswith(ready))
        mine = psutil.Process(client.pid).children(recursive=True)
        named = [psutil.Process(int(pid)) for pid in said.split()[1:] if pid.isdigit()]
        assert all(map(is_running, [*mine, *named])) and mine
    finally:
        client.kill()
        client.wait()
    return [*mine, *named]


@pytest.mark.parametrize("how", ["spawn", "run_tool"])
def test_a_killed_client_takes_all_with_it(how):
    processes = kill_client(how, *PROGRAM, ready="pids")
    assert len({process.pid for process in processes}) == 2
    assert wait_until_ended(processes) == []


def test_the_thread_that_started_it_may_end():
    processes = kill_client("thread", *PROGRAM, ready="thread ended")
    assert len(processes) == 2
    assert wait_until_ended(processes) == []


@pytest.mark.slow
@pytest.mark.engine
def test_a_real_server_and_its_engine_end_with_their_client():
    processes = kill_client("serve", str(MODEL), ready="serving")
    assert len(processes) >= 3  # the server, its engine, a worker
    assert wait_until_ended(processes) == []


def test_nothing_is_left_at_the_end_of_the_block():
    with spawn(PROGRAM, stdout=subprocess.PIPE, text=True) as process:
        pids = process.stdout.readline().split()[1:]
        processes = [psutil.Process(int(pid)) for pid in pids]
        assert processes[0].pid == process.pid and all(map(is_running, processes))
    assert process.returncode == -signal.SIGKILL
    assert wait_until_ended(processes) == []


def test_grace():
    asked = ["/bin/sh", "-c", "trap 'echo asked; exit 5' TERM; echo ready; while :; do sleep 0.05; done"]
    with spawn(asked, 10, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
    assert (process.stdout.read(), process.returncode) == ("asked\n", 5)


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -SEGV $$", -signal.SIGSEGV), ("exit 0", 0)])
def test_the_program_is_itself(script, code):
    """Its own status and output, which ends with it, and signals as it would have them from a shell."""
    with spawn(["/bin/sh", "-c", f"echo said; {script}"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.read() == "said\n"
        assert process.wait() == code
    with spawn(["/bin/sh", "-c", "yes | head -1; kill -PIPE $$"], stdout=subprocess.PIPE, text=True) as process:
        assert (process.stdout.read(), process.wait()) == ("y\n", -signal.SIGPIPE)


def test_what_cannot_be_started(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such"), spawn([str(tmp_path / "no-such")]):
        pass
    (tmp_path / "text").write_text("text")
    with pytest.raises(PermissionError, match="text"), spawn([str(tmp_path / "text")]):
        pass
    (tmp_path / "text").chmod(0o755)
    (tmp_path / "text").write_bytes(b"\x7fELF")
    with spawn([str(tmp_path / "text")], stderr=subprocess.PIPE, text=True) as process:
        assert process.wait() == 1
        assert process.stderr.read() == f"{tmp_path / 'text'}: Exec format error\n"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads Linux's /proc")
def test_the_program_holds_what_this_process_locks(tmp_path):
    """So that no other run begins while that of a killed one still writes; its watcher does not."""
    with exclusive(tmp_path / "file") as partial, spawn(["sleep", "60"]) as process:
        deadline = time.monotonic() + SECONDS
        while (holders := holding(partial)) != {process.pid, os.getpid()} and time.monotonic() < deadline:
            time.sleep(0.05)
        assert holders == {process.pid, os.getpid()}
        partial.unlink()
    assert held() == ()


def holding(file: Path) -> set[int]:
    """Processes that have a file open; some may be gone while this looks."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(opened.path == str(file) for opened in process.open_files()):
                found.add(process.pid)
    return found
