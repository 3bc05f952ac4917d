"""Sources that change between a killed run and the next: refused in one line, or begun anew; never a mixture."""

import dataclasses
import os
import shutil
import signal

import pytest
from crash_runs import check_same, make, must_succeed, snapshot
from safetensors import safe_open
from safetensors.numpy import save_file


def flip(path):
    """Another byte in the middle of a file; the time of modification goes with it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 1))


def spaced(path):
    path.write_text(path.read_text() + "\n")


def reworded(path):
    path.write_text(path.read_text().replace("wrote", "reads"))


def doubled(path):
    """Statistics of larger inputs; bytes that decide no scale may change."""
    with safe_open(path, "numpy") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file({name: 2 * array for name, array in arrays.items()}, path, metadata)


CHANGES = {
    "a byte of a shard": ("quantize quark-int8", "base", "model-00001-of-00002.safetensors", flip, "another source"),
    "the configuration": ("quantize quark-int8", "base", "config.json", spaced, "another source"),
    "the statistics": ("quantize fp8-static", "statistics", "", doubled, "another"),
    "a byte of the base": ("restore", "base", "model-00001-of-00002.safetensors", flip, "another base"),
    "the text": ("calibrate", "text.txt", "", reworded, "another texts"),
    "the text of a refit": ("prune with refit", "text.txt", "", reworded, "another texts"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
def test_refused(server, known, made, what, tmp_path):
    name, source, within, change, said = CHANGES[what]
    original, copy = made / source, tmp_path / source
    shutil.copytree(original, copy) if original.is_dir() else shutil.copy2(original, copy)
    arguments = [copy if argument == original else argument for argument in known[name].arguments]
    case = dataclasses.replace(known[name], arguments=arguments)
    events = must_succeed(server.run(case, make(tmp_path / "counted", case))).events
    folder = make(tmp_path / "run", case)
    assert server.run(case, folder, at=events // 2).status == -signal.SIGKILL
    before = snapshot(folder)
    change(copy / within if within else copy)
    ended = server.run(case, folder)
    assert ended.status == 2 and ended.printed.count("\n") == 1 and said in ended.printed, ended
    check_same(snapshot(folder), before)


@pytest.mark.slow
def test_a_sidecar_is_taken_as_it_is_at_the_end(server, known, made, tmp_path):
    """It decides no byte of a shard: what is finished stays, and the result is that of the source as it is now."""
    copy = tmp_path / "base"
    shutil.copytree(made / "base", copy)
    arguments = [copy if argument == made / "base" else argument for argument in known["quantize quark-int8"].arguments]
    case = dataclasses.replace(known["quantize quark-int8"], arguments=arguments)
    events = must_succeed(server.run(case, make(tmp_path / "counted", case))).events
    folder, whole = make(tmp_path / "run", case), make(tmp_path / "whole", case)
    assert server.run(case, folder, at=events // 2).status == -signal.SIGKILL
    spaced(copy / "chat_template.jinja")
    must_succeed(server.run(case, folder))
    must_succeed(server.run(case, whole))
    check_same(snapshot(folder), snapshot(whole))


@pytest.mark.slow
def test_another_imatrix_is_planned_anew(server, known, made, tmp_path):
    """What the cache has of the old one is of no use, and is not used."""
    known_case, original = known["plan"], made / "gguf" / "imatrix.gguf"
    copy = shutil.copy2(original, tmp_path / "imatrix.gguf")
    arguments = [copy if argument == original else argument for argument in known_case.arguments]
    case = dataclasses.replace(known_case, arguments=arguments)
    folder, whole = make(tmp_path / "run", case), make(tmp_path / "whole", case)
    assert server.run(case, folder, at=15).status == -signal.SIGKILL
    flip(copy)
    must_succeed(server.run(case, folder))
    must_succeed(server.run(case, whole))
    assert {name: content for name, content in snapshot(folder).items() if name != "errors.jsonl"} == {
        name: content for name, content in snapshot(whole).items() if name != "errors.jsonl"
    }
