"""Shapes of past advisories: every file of `corpus/` and the exact answer to it, as its README says."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from hostile.build_corpus import files
from in_process import run

CORPUS = Path(__file__).with_name("corpus")
DENSE = Path(__file__).resolve().parents[2] / "examples" / "small_gemma4" / "dense"
ROW = re.compile(
    r"^\| `(?P<name>[^`]+)` \| (?P<what>[^|]+) \| (?P<follows>[^|]+) \| `(?P<command>[^`]+)` \| (?P<answer>.+) \|$"
)
ROWS = [match for line in (CORPUS / "README.md").read_text().splitlines() if (match := ROW.match(line))]


def test_every_file_has_a_row_and_comes_from_its_script():
    written = dict(files())
    stored = {str(path.relative_to(CORPUS)): path.read_bytes() for path in CORPUS.rglob("*") if path.is_file()}
    stored.pop("README.md")
    assert stored == written
    named = [match["name"] for match in ROWS]
    assert len(set(named)) == len(named)
    assert {name for name in stored if not any(name == row or name.startswith(f"{row}/") for row in named)} == set()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_the_answer(row, tmp_path, monkeypatch):
    source = tmp_path / row["name"]
    path = CORPUS / row["name"]
    shutil.copytree(path, source) if path.is_dir() else shutil.copy(path, source)
    if source.suffix == ".safetensors":
        source = _checkpoint_of(source)
    elif not (source / "config.json").exists() and source.is_dir():
        source = _whole_checkpoint(source, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    words = [
        word.replace("FILE", str(source)).replace("DST", str(tmp_path / "made")) for word in row["command"].split()
    ]
    code, out, err = run(*words)
    answer = row["answer"].strip("`")
    if answer.startswith("error: "):
        assert (code, err, out) == (2, answer.replace("FOLDER", str(source)) + "\n", "")
    else:
        assert code == 0 and answer in out, (code, out, err)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written, opened as code or rendered


def _checkpoint_of(shard: Path) -> Path:
    """A folder whose only file of weights is this one."""
    folder = shard.parent / "checkpoint"
    folder.mkdir()
    shard.rename(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def _whole_checkpoint(part: Path, folder: Path) -> Path:
    """The small model with a part of another's: keys of its configuration, or its chat template."""
    whole = folder / "whole"
    shutil.copytree(DENSE, whole, copy_function=os.link)
    for path in part.iterdir():
        target = whole / (path.name if path.suffix == ".jinja" else "config.json")
        content = path.read_text()
        if path.suffix == ".json":
            changed = json.loads(content)
            if "quant_method" in changed:
                changed = {"quantization_config": changed}
            content = json.dumps({**json.loads((DENSE / "config.json").read_text()), **changed})
        target.unlink()
        target.write_text(content)
    return whole
