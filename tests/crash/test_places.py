"""Targets that cannot be written, or not to the end, are on another file system, or have a second run at them.

A full disk and a read-only one are real small tmpfs; where mounting is not permitted, these tests are skipped.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_cases import CASES
from crash_runs import Case, Files, check_same, check_unfinished, make, must_succeed, snapshot

GSM8K = "evaluate gsm8k"
GROWN, PAGE = "64m", 4096


@pytest.fixture(scope="module")
def unbroken() -> dict[str, tuple[int, Files]]:
    return {}


@pytest.fixture
def events_and_files(server, case, place, unbroken) -> tuple[int, Files]:
    """How often an unbroken run changes files, and what it leaves; run once a command."""
    if case.name not in unbroken:
        whole = make(place / "whole", case)
        unbroken[case.name] = must_succeed(server.run(case, whole)).events, snapshot(whole)
    return unbroken[case.name]


@pytest.fixture
def expected(events_and_files) -> Files:
    return events_and_files[1]


@pytest.fixture
def disk(tmp_path) -> Iterator[Path | None]:
    """The place of a tmpfs that `remount` makes; None where mounting is not permitted."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "crash", place], capture_output=True).returncode:
        yield None
        return
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


def refused(ended, told: str = "") -> str:
    """The one line that tells why."""
    assert ended.status == 2, (ended, told)
    lines = [line for line in ended.printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in ended.printed, ended.printed
    return lines[0]


@pytest.mark.slow
def test_a_full_disk(server, case: Case, expected, events_and_files, disk):
    """Half of what is needed: one line, nothing half-written under its name; with more room, the same bytes. A killed
    run that goes on where there is no room at all loses nothing."""
    if disk is None:
        pytest.skip("no tmpfs may be mounted here; a limit on sizes is tested below")
    remount(disk, f"size={GROWN}")
    folder = make(disk / "run", case)
    half = sum(map(len, expected.values())) // 2
    remount(disk, f"size={shutil.disk_usage(disk).used + max(PAGE, half // PAGE * PAGE)}")
    check_stopped(server.run(case, folder), case, folder, expected)
    remount(disk, f"size={GROWN}")
    if server.run(case, folder, at=max(1, events_and_files[0] * 3 // 4)).status == -signal.SIGKILL:
        server.check_nothing_left(folder)
        before = snapshot(folder)
        remount(disk, f"size={shutil.disk_usage(disk).used}")
        if server.run(case, folder).status:
            gone = {name for name in before.keys() - snapshot(folder).keys() if name in expected}
            assert not gone, gone
    remount(disk, f"size={GROWN}")
    must_succeed(server.run(case, folder))
    check_same(snapshot(folder), expected, f"{case}")
    server.check_nothing_left(folder)


@pytest.mark.slow
def test_a_limit_on_sizes(server, case: Case, expected, place):
    """What no look at the free space foretells: a write that stops in the middle of the largest file, or of others."""
    largest = max(map(len, expected.values()))
    for share in (0.05, 0.95):
        folder = make(place / "run", case)
        ended = server.run(case, folder, file_bytes=int(share * largest))
        line = check_stopped(ended, case, folder, expected)
        assert "File too large" in line or "killed by SIGXFSZ" in line, line  # llama.cpp's programs say nothing
        must_succeed(server.run(case, folder))
        check_same(snapshot(folder), expected, f"{case}, {share}")
        server.check_nothing_left(folder)
        shutil.rmtree(folder)


def check_stopped(ended, case: Case, folder: Path, expected) -> str:
    """Assert that a run was refused, and left nothing half-written; the line that it printed."""
    line = refused(ended)
    check_unfinished(case, folder, expected, f"{case}: {line}")
    assert not [name for name in snapshot(folder) if name.endswith((".partial", ".partial.gguf"))], line
    return line


@pytest.mark.slow
def test_a_read_only_target(server, case: Case, expected, disk):
    if disk is None:
        pytest.skip("no tmpfs may be mounted here, and root ignores permissions")
    remount(disk, f"size={GROWN}")
    folder = make(disk / "run", case)
    before = snapshot(folder)
    remount(disk, "ro")
    line = refused(server.run(case, folder))
    assert "Read-only file system" in line, line
    assert snapshot(folder) == before
    remount(disk, "rw")
    must_succeed(server.run(case, folder))
    check_same(snapshot(folder), expected)


@pytest.mark.slow
def test_a_target_on_another_file_system(server, case: Case, expected, events_and_files, disk):
    """Than TMPDIR, and than all that is read: killed once there, too."""
    place = Path("/dev/shm") if disk is None else disk
    if disk is not None:
        remount(disk, f"size={GROWN}")
    if place.stat().st_dev == server.temporary.stat().st_dev:
        pytest.skip("there is no second file system here")
    folder = make(place / f"crash-{os.getpid()}", case)
    try:
        ended = server.run(case, folder, at=max(1, events_and_files[0] // 2))
        assert ended.status == -signal.SIGKILL
        must_succeed(server.run(case, folder))
        check_same(snapshot(folder), expected)
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name != GSM8K], indirect=True)
def test_a_second_run_is_refused(server, case: Case, expected, events_and_files, place):
    """The first is stopped at some points while the second tries, in the same folder. Before the first has begun to
    write, and when it has ended, the second may do its work: then the first must not spoil it."""
    refusals = []
    for share in (0.34, 0.5, 0.75):
        folder = make(place / f"run-{share}", case)
        first = server.start(case, folder, at=max(2, int(share * events_and_files[0])), number=signal.SIGSTOP)
        assert server.wait(first).status is None
        before = snapshot(folder)
        second = server.run(case, folder)
        if second.status:
            refusals.append(refused(second))
            assert snapshot(folder) == before
        server.go_on(first)
        must_succeed(server.wait(first))
        check_same(snapshot(folder), expected, f"{case}, {share}")
    assert refusals and all("another run is writing" in line for line in refusals), refusals


@pytest.mark.slow
def test_a_second_evaluation_is_refused(server, known, place):
    """Which changes its file without a moment that is counted: stopped when it has a reply."""
    case = known[GSM8K]
    whole, folder = make(place / "whole", case), make(place / "run", case)
    must_succeed(server.run(case, whole))
    first = server.start(case, folder)
    while not (folder / "results.jsonl").exists() or (folder / "results.jsonl").read_bytes().count(b"\n") < 2:
        time.sleep(0.0005)
    os.kill(first, signal.SIGSTOP)
    assert server.wait(first).status is None
    before = snapshot(folder)
    assert "another run is writing" in refused(server.run(case, folder))
    assert snapshot(folder) == before
    server.go_on(first)
    must_succeed(server.wait(first))
    check_same(snapshot(folder), snapshot(whole))
