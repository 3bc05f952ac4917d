"""Places of files that are written at the end of long work: refused before it begins."""

import sys

import in_process
import pytest
from gguf_files import small_moe, write_gguf
from quantize_runs import with_imatrices

from gguf_mixed import backward
from gguf_mixed.atomic_file import PARTIAL, WriteError, check_place, exclusive, replacing
from gguf_mixed.commands import plan, sweep


def test_a_good_place_is_left_as_it_was(tmp_path):
    (tmp_path / "old").write_text("old")
    (tmp_path / f"new{PARTIAL}").write_text("of a killed run")
    for name in ("old", "new"):
        check_place(tmp_path / name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "old")]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none/file", "No such file or directory"), ("folder", "Is a directory"), ("file/file", "Not a directory")],
)
def test_a_bad_place_is_refused(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=f"{name}: cannot be written: {reason}"):
        check_place(tmp_path / name)
    with pytest.raises(WriteError, match=reason), replacing(tmp_path / name):
        pytest.fail("the block is not entered")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    def refused(*_):  # root may write anywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("gguf_mixed.atomic_file.os.open", refused)
    with pytest.raises(WriteError, match="file: cannot be written: Permission denied"):
        check_place(tmp_path / "file")


def test_a_place_that_another_run_holds_is_refused(tmp_path):
    with exclusive(tmp_path / "file") as partial:
        with pytest.raises(WriteError, match="file: another run is writing here"):
            check_place(tmp_path / "file")
        assert partial.exists()


def forbid(monkeypatch, module, name):
    def begun(*_, **__):
        raise AssertionError(f"{name} was begun")

    monkeypatch.setattr(module, name, begun)


def test_fisher_looks_before_it_loads_a_model(tmp_path, monkeypatch):
    forbid(monkeypatch, backward, "load")
    model = write_gguf(tmp_path / "model.gguf", small_moe())
    (tmp_path / "text.txt").write_text("text")
    given = ["fisher", model, "--text", tmp_path / "text.txt", "-o"]
    for output, reason in ((tmp_path / "none" / "f", "No such file or directory"), (tmp_path, "Is a directory")):
        finished = in_process.run("gguf-mixed", *given, output)
        assert (finished.returncode, finished.stdout) == (2, "")
        assert finished.stderr == f"error: {output}: cannot be written: {reason}\n"


def test_plan_looks_before_it_measures(tmp_path, monkeypatch):
    forbid(monkeypatch, plan, "error_table")
    with_imatrices(tmp_path)
    (tmp_path / "folder.json").mkdir()
    for name in ("none/table", "folder"):  # the sidecar's place is looked at too
        given = ["plan", tmp_path / "model.gguf", "--recipe", "optimal", "--bpw", 6, "-o", tmp_path / name]
        finished = in_process.run("gguf-mixed", *given)
        assert (finished.returncode, finished.stderr.count("\n")) == (2, 1)
        assert finished.stderr.startswith(f"error: {tmp_path / name}") and "cannot be written" in finished.stderr


def test_sweep_looks_before_it_measures(tmp_path, monkeypatch):
    forbid(monkeypatch, sweep, "error_table")
    with_imatrices(tmp_path)
    for name in ("llama-perplexity", "llama-quantize"):
        (tmp_path / name).symlink_to(sys.executable)
    (tmp_path / "text.txt").write_text("text")
    common = ["sweep", tmp_path / "model.gguf", tmp_path / "out", "--no-plot", "--bpw", 6, "--tiers", "none"]
    measuring = ["--text", tmp_path / "text.txt", "--base", tmp_path / "none" / "base", "--llama-cpp", tmp_path]
    finished = in_process.run("gguf-mixed", *common, *measuring)
    assert (finished.returncode, finished.stderr.count("\n")) == (2, 1)
    assert finished.stderr.startswith(f"error: {tmp_path / 'none' / 'base'}: cannot be written: No such file")
    with exclusive(tmp_path / "out" / "results.json"):
        finished = in_process.run("gguf-mixed", *common)
    assert (finished.returncode, finished.stderr.count("\n")) == (2, 1)
    assert "results.json: another run is writing here" in finished.stderr
