"""What a sweep leaves and goes on with: whose results these are, room for distributions. tests/crash kills it.

The engine is one that draws its answers; checkpoints are written as they are for users.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from exl3_runs import FULL, tiny_config
from synthetic import write_checkpoint

from vllm_gemma4q.evaluation.engines.interface import Scores, all_windows, perplexities
from vllm_gemma4q.evaluation.engines.vllm import VLLM

DENSE = Path(__file__).resolve().parents[2] / "examples" / "small_gemma4" / "dense"
VOCABULARY = 256


@pytest.fixture
def measured(monkeypatch):
    """Names of the folders that were measured."""
    names = []

    def score(self, model, windows, log, distributions=None):
        names.append(model.resolve().name)
        positions = sum(window.n_predicted for window in all_windows(windows))
        rows = np.random.default_rng(len(names)).standard_normal((positions, VOCABULARY), np.float32)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        rows.tofile(distributions)
        return Scores(perplexities(model, rows[:, 0], windows), VOCABULARY, 0.1)

    monkeypatch.setattr(VLLM, "score", score)
    return names


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A folder that is the working directory, with a model and a text."""
    pytest.importorskip("vllm")
    write_checkpoint(tmp_path / "tiny", tiny_config(FULL))
    for path in DENSE.glob("*token*"):
        shutil.copy(path, tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("The interpreter reads a line, and then another one.\n" * 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sweep(gemma4q, made):
    def run(source="tiny", folder="sweep", text="text.txt", chunks=1, context=64):
        rates = ("--bits", 4, "--head-bits", 16, "--no-hessian", "--framing", "raw")
        size = ("--chunks", chunks, "--context", context)
        return gemma4q("sweep", source, folder, "--text", text, *rates, *size, "--json")

    return run


def other_source(made):
    write_checkpoint(made / "other", tiny_config(FULL), seed=1)
    for path in DENSE.glob("*token*"):
        shutil.copy(path, made / "other")
    return {"source": "other"}


def other_text(made):
    (made / "second.txt").write_text("Another text, of which a line says nothing.\n" * 20)
    return {"text": "second.txt"}


OTHERS = [
    (other_source, r"source tiny \(\w{8}\), expected other \(\w{8}\)"),
    (other_text, r"text 1 text.txt \(\w{8}\), expected second.txt \(\w{8}\)"),
    (lambda _: {"chunks": 2}, r"windows {'raw': 1}, expected {'raw': 2}"),
    (lambda _: {"context": 48}, "context 64, expected 48"),
]


def test_the_same_from_elsewhere_and_others(sweep, made, measured, monkeypatch):
    code, first, _ = sweep()
    assert code == 0 and measured == ["tiny", "exl3-4bpw-h16-mcg"]
    (made / "elsewhere").mkdir()
    shutil.copy("text.txt", "elsewhere/renamed.txt")
    monkeypatch.chdir(made / "elsewhere")
    for given in ({"source": "../tiny"}, {"source": made / "tiny", "text": "renamed.txt"}):
        code, again, err = sweep(folder="../sweep", **{"text": "../text.txt", **given})
        assert code == 0, err
        assert json.loads(again)["points"] == json.loads(first)["points"]
    assert len(measured) == 2

    monkeypatch.chdir(made)
    before = (made / "sweep" / "results.json").read_bytes()
    for change, message in OTHERS:
        code, out, err = sweep(**change(made))
        assert (code, out, err.count("\n")) == (2, "", 1)
        expected = rf"error: sweep/results.json: made with {message}: another FOLDER, or move the file away\n"
        assert re.fullmatch(expected, err), err
        assert (made / "sweep" / "results.json").read_bytes() == before
    assert len(measured) == 2


@pytest.mark.parametrize("content", [{}, {"reference": 3, "protocol": {"texts": 3}}, {"format": "gguf-mixed sweep 1"}])
def test_results_of_something_else(content, sweep, made, measured):
    (made / "sweep").mkdir()
    (made / "sweep" / "results.json").write_text(json.dumps(content))
    code, _, err = sweep()
    assert code == 2 and err.startswith("error: sweep/results.json: made with source None, expected tiny (")
    assert not measured and json.loads((made / "sweep" / "results.json").read_text()) == content


def test_room_is_looked_for_before_anything_is_written(sweep, made, measured, monkeypatch):
    """31 positions of the original and of one other."""
    needed, real = 2 * 31 * 4 * VOCABULARY, shutil.disk_usage(made)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: real._replace(free=needed - 1))
    code, _, err = sweep()
    expected = (
        f"error: sweep: distributions of two models take {needed:,} bytes, and {needed - 1:,} are free: "
        "fewer --chunks, or another FOLDER\n"
    )
    assert (code, err, measured) == (2, expected, [])
    assert not list((made / "sweep").iterdir())
