"""Temporary folders and files that go with their process, also a killed one."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from gguf_mixed.atomic_file import WriteError
from gguf_mixed.temporary import removed_if_killed, temporary_folder
from vllm_gemma4q.evaluation.server import engine_environment, engine_folder

# Makes a folder and a log, fills them, says so, and waits.
CLIENT = """
import sys, time
from pathlib import Path
from gguf_mixed.temporary import removed_if_killed, temporary_folder
place = Path(sys.argv[1])
with removed_if_killed(place / "engine.log"), temporary_folder(place=place) as folder:
    (place / "engine.log").write_text("line")
    (folder / "within").mkdir()
    (folder / "within" / "file").write_bytes(bytes(1 << 20))
    print("ready", flush=True)
    time.sleep(600)
"""
SECONDS = 20


def wait_until_empty(place: Path) -> list[str]:
    deadline = time.monotonic() + SECONDS
    while (left := sorted(path.name for path in place.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_leaves_nothing(number, tmp_path):
    """Its whole process group, as by a shell."""
    place = tmp_path / "with a 'quote' and $HOME"
    place.mkdir()
    command = [sys.executable, "-c", CLIENT, place]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as client:
        assert client.stdout.readline() == "ready\n"
        assert len(list(place.iterdir())) == 2
        os.killpg(client.pid, number)
    assert client.returncode == -number
    assert wait_until_empty(place) == []


def test_at_the_end_of_the_block(tmp_path):
    kept = tmp_path / "engine.log"
    with removed_if_killed(kept), temporary_folder("prefix-", tmp_path) as folder:
        kept.write_text("line")
        assert folder.parent == tmp_path and folder.name.startswith("prefix-") and not list(folder.iterdir())
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "file").write_text("text")
    assert list(tmp_path.iterdir()) == [kept]
    with pytest.raises(ZeroDivisionError), temporary_folder(place=tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == [kept]


def test_a_place_that_is_not_there(tmp_path):
    with pytest.raises(WriteError, match="cannot be written: No such file"), temporary_folder(place=tmp_path / "no"):
        pass


def test_sockets_of_vllm_have_room(tmp_path, monkeypatch):
    """Unix allows 107 characters; a socket in the folder has 37 of them. So a long place is not the folder's."""
    long = tmp_path / ("x" * 50)
    long.mkdir()
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        for place, chosen in ((short, short), (long, "/tmp")):
            monkeypatch.setattr(tempfile, "tempdir", str(place))
            with engine_folder() as folder:
                assert len(str(folder)) + 37 <= 107
                assert folder.parent == Path(chosen)
                assert engine_environment(folder)["TMPDIR"] == str(folder)
            assert not folder.exists()
