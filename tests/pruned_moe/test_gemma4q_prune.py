"""`gemma4q prune` as it is run: what it writes and prints."""

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
from masked_model import MaskedModel
from prune_commands import content, gemma4q
from prune_files import EXAMPLE, LAYERS, config, differences, retained, run, write
from pruned_checkpoints import NON_UNIFORM, UNIFORM
from tolerances import REFIT_KLD, rms_error
from vllm_plugin.checkpoints import load

from vllm_gemma4q.calibration.statistics import read_statistics
from vllm_gemma4q.calibration.texts import load_samples
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.run import MANIFEST
from vllm_gemma4q.pruned_moe.choose import Chooser
from vllm_gemma4q.quark_int8 import quantize as quark_int8

RUN = ("--samples", 12, "--max-length", 96)
COMMAND = [Path(sys.executable).with_name("gemma4q"), "prune"]


@pytest.fixture
def choice(statistics_file):
    return ["--statistics", statistics_file, "--keep", 12]


@pytest.fixture
def chooser(statistics_file):
    return Chooser(open_checkpoint(EXAMPLE), read_statistics(statistics_file), 12)


@pytest.fixture
def drop_map(tmp_path):
    path = tmp_path / "given.json"
    path.write_text(json.dumps(retained(NON_UNIFORM).to_json()))
    return path


def test_uniform(choice, chooser, tmp_path):
    report = json.loads(gemma4q("prune", EXAMPLE, tmp_path / "target", *choice, "--recipe", "v3", "--json"))
    assert report["experts"] == {"before": 16, "after": [12, 12, 12]}
    assert (report["written"], report["refit"]) == (True, False)
    kept = chooser.uniform("v3").kept
    assert not differences(load(tmp_path / "target"), run(EXAMPLE, tmp_path / "expected", kept))
    details = json.loads((tmp_path / "target" / MANIFEST).read_text())["details"]
    assert (details["recipe"], details["keep"], details["spread"]) == ("v3", 12, False)
    assert [text["name"] for text in details["statistics"]["texts"]] == ["text.txt", "held_out.txt"]
    again = gemma4q("prune", EXAMPLE, tmp_path / "target", *choice, "--recipe", "v3")
    assert f"3 layers keep 12 of 16 experts, bit for bit as they were.\n{tmp_path / 'target'} is already" in again


def test_recipes_from_weights_need_no_statistics(tmp_path):
    gemma4q("prune", EXAMPLE, tmp_path / "target", "--keep", 12, "--recipe", "magnitude")
    kept = Chooser(open_checkpoint(EXAMPLE), None, 12).uniform("magnitude").kept
    assert not differences(load(tmp_path / "target"), run(EXAMPLE, tmp_path / "expected", kept))


def test_drop_map_in_and_out(drop_map, tmp_path):
    written = tmp_path / "again.json"
    target = [tmp_path / "target", "--drop-map", drop_map, "--drop-map-output", written]
    printed = gemma4q("prune", EXAMPLE, *target)
    assert "3 layers keep 9 to 16, 12.3 on average, of 16 experts, bit for bit" in printed
    assert f"Serve it: vllm serve {tmp_path / 'target'}" in printed.replace("\n", "")
    assert json.loads(written.read_text()) == json.loads(drop_map.read_text())
    assert not differences(load(tmp_path / "target"), run(EXAMPLE, tmp_path / "expected", NON_UNIFORM))
    summary = json.loads((tmp_path / "again.summary.json").read_text())
    assert (summary["kept_per_layer"], summary["drop_map"]) == ([12, 9, 16], "given.json")


def test_summary_says_how_it_was_chosen(choice, chooser, tmp_path):
    path = tmp_path / "drop.json"
    printed = gemma4q("prune", EXAMPLE, *choice, "--recipe", "reap", "--scores-only", "--drop-map-output", path)
    assert json.loads(path.read_text()) == chooser.uniform("reap").to_json()
    summary = json.loads((tmp_path / "drop.summary.json").read_text())
    assert (summary["recipe"], summary["keep"]) == ("reap", 12)
    assert summary["overlap"]["reap"] == 1
    mine, other = ({*enumerate(map(tuple, chooser.uniform(name).dropped))} for name in ("reap", "v3"))
    assert summary["overlap"]["v3"] == 1 or mine != other
    assert "v3 drops" in printed
    assert "reap drops" not in printed
    gemma4q("prune", EXAMPLE, tmp_path / "one", *choice, "--recipe", "reap")
    gemma4q("prune", EXAMPLE, tmp_path / "other", "--drop-map", path)
    assert not differences(load(tmp_path / "one"), load(tmp_path / "other"))


def test_scores(choice, chooser, tmp_path):
    picture = tmp_path / "scores.png"
    report = json.loads(gemma4q("prune", EXAMPLE, *choice, "--recipe", "v4", "--scores-only", "--json"))
    assert np.array_equal(report["scores"], chooser.scores("v4"))
    assert report["kept"] == [list(kept) for kept in chooser.uniform("v4").kept]
    assert set(report["overlap"]) == set(chooser.at_hand)
    printed = gemma4q("prune", EXAMPLE, *choice, "--recipe", "v4", "--scores-only", "--plot", picture)
    assert f"{chooser.scores('v4')[1].max():.4g}" in printed
    assert " ".join(map(str, chooser.uniform("v4").dropped[1])) in printed
    assert [path.name for path in tmp_path.iterdir()] == ["scores.png"]
    pixels = picture_of(picture)
    assert pixels.shape[1] == 900
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 30  # scores are colours
    fewer = tmp_path / "fewer.png"
    gemma4q("prune", EXAMPLE, *choice[:3], 5, "--recipe", "v4", "--scores-only", "--plot", fewer)
    assert not np.array_equal(picture_of(fewer), pixels)  # the cut is elsewhere


def picture_of(path):
    from matplotlib.image import imread

    return imread(path)


def test_class_weights(choice, tmp_path):
    command = ["prune", EXAMPLE, *choice, "--recipe", "v5-coder", "--scores-only", "--json"]
    even, weighted = json.loads(gemma4q(*command)), json.loads(gemma4q(*command, "--class-weight", "held_out.txt=4"))
    assert even["scores"] != weighted["scores"]
    assert json.loads(gemma4q(*command, "--class-weight", "held_out.txt=1")) == even


def test_spread(choice, chooser, text, tmp_path):
    target = tmp_path / "target"
    options = ["--spread", "--text", text, "--no-refit", *RUN]
    report = json.loads(gemma4q("prune", EXAMPLE, target, *choice, *options, "--json"))
    counts = report["experts"]["after"]
    assert sum(counts) == 36
    assert len(set(counts)) > 1
    assert config(target)["text_config"]["num_experts_per_layer"] == counts
    scores = chooser.scores("contribution")
    kept = [sorted((-row).argsort()[:count].tolist()) for row, count in zip(scores, counts, strict=True)]
    assert not differences(load(target), run(EXAMPLE, tmp_path / "expected", kept))


def test_evaluate(choice, chooser, text, held_out, tmp_path):
    options = ["--evaluate", held_out, *RUN, "--dtype", "float32", "--text", text]
    others = ["--compare", "v3", "--compare", "random", "--compare", "aimer"]
    report = json.loads(gemma4q("prune", EXAMPLE, *choice, *options, *others, "--json"))
    assert report["kept_per_layer"] == [12, 12, 12]
    assert list(report["candidates"]) == ["contribution", "v3", "random", "aimer", "contribution + refit"]
    ids = load_samples(EXAMPLE, [held_out], 12, 96).ids
    model = MaskedModel(EXAMPLE)
    unpruned = model.run(ids)
    for name in ("contribution", "v3", "random", "aimer"):
        kld = model.run(ids, chooser.uniform(name).kept).divergence_from(unpruned)
        assert report["candidates"][name]["mean_kld"] == pytest.approx(float(kld.mean()), rel=1e-4), name
    gemma4q("prune", EXAMPLE, tmp_path / "written", *choice, *RUN, "--dtype", "float32", "--text", text)
    written = MaskedModel(tmp_path / "written").run(ids).divergence_from(unpruned)
    fitted = report["candidates"]["contribution + refit"]
    assert fitted["mean_kld"] == pytest.approx(float(written.mean()), rel=1e-4)
    assert fitted["mean_kld"] < report["candidates"]["contribution"]["mean_kld"]
    printed = gemma4q("prune", EXAMPLE, *choice, *options, "--no-refit", *others, "--plot", tmp_path / "a.png")
    rows = [line.split()[0] for line in printed.splitlines() if "%" in line and ".." in line]
    assert sorted(rows) == ["aimer", "contribution", "random", "v3"]
    means = {name: found["mean_kld"] for name, found in report["candidates"].items()}
    assert rows == sorted(rows, key=means.get)
    assert f"{sum(map(len, ids)):,} positions, whole vocabulary" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "written"]


def test_evaluate_compares_all_recipes_there_are(choice, chooser, held_out):
    report = json.loads(gemma4q("prune", EXAMPLE, *choice, "--evaluate", held_out, *RUN[:1], 2, *RUN[2:], "--json"))
    assert set(report["candidates"]) == set(chooser.available)


def test_evaluate_a_drop_map(drop_map, held_out):
    command = ["prune", EXAMPLE, "--drop-map", drop_map, "--evaluate", held_out, "--samples", 2, "--max-length", 64]
    report = json.loads(gemma4q(*command, "--json"))
    assert (report["kept_per_layer"], list(report["candidates"])) == ([12, 9, 16], ["given.json"])
    smaller = json.loads(gemma4q(*command, "--json", "--top-k", 2))
    assert smaller["candidates"]["given.json"]["mean_kld"] != report["candidates"]["given.json"]["mean_kld"]


def test_refit_is_not_made_again(choice, text, tmp_path, monkeypatch):
    from vllm_gemma4q.pruned_moe.refit import Refit

    command = ["prune", EXAMPLE, tmp_path / "target", *choice, "--text", text, *RUN]
    printed = gemma4q(*command)
    assert "12 of 16 experts, refitted.\nWrote" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    details = json.loads((tmp_path / "target" / MANIFEST).read_text())["details"]
    assert (details["refit"]["samples"], details["refit"]["texts"][0]["name"]) == (12, "text.txt")
    before = content(tmp_path)
    monkeypatch.setattr(Refit, "run", None)
    assert "is already complete: nothing to do" in gemma4q(*command)
    assert json.loads(gemma4q(*command, "--json"))["written"] is False
    assert "Nothing was written (--dry-run)" in gemma4q(*command[:2], tmp_path / "new", *command[3:], "--dry-run")
    assert content(tmp_path) == before


def test_refit_with_knobs(choice, chooser, text, tmp_path):
    knobs = ["--top-k", 3, "--shared-boost", 1.2, "--soft-transfer", 0.3]
    gemma4q("prune", EXAMPLE, tmp_path / "fitted", *choice, "--text", text, *RUN, *knobs)
    gemma4q("prune", EXAMPLE, tmp_path / "plain", *choice, *knobs)
    gemma4q("prune", EXAMPLE, tmp_path / "without", *choice, "--text", text, *RUN)
    fitted, plain, without = (load(tmp_path / name) for name in ("fitted", "plain", "without"))
    experts = [f"{LAYERS}{layer}.experts.down_proj" for layer in range(3)]
    assert differences(fitted, plain) == experts
    assert set(experts) < set(differences(fitted, without))
    assert config(tmp_path / "fitted")["text_config"]["top_k_experts"] == 3
    assert rms_error(fitted[experts[0]].float(), without[experts[0]].float()) > REFIT_KLD


def test_quantized_source_with_the_statistics_of_its_bf16(choice, chooser, tmp_path):
    write(quark_int8.plan(open_checkpoint(EXAMPLE)), tmp_path / "int8")
    gemma4q("prune", tmp_path / "int8", tmp_path / "pruned", *choice)
    run(EXAMPLE, tmp_path / "bf16", chooser.uniform("contribution").kept)
    write(quark_int8.plan(open_checkpoint(tmp_path / "bf16")), tmp_path / "expected")
    assert not differences(load(tmp_path / "pruned"), load(tmp_path / "expected"))


def shown(terminal):
    """All that was written to a terminal."""
    found = b""
    with os.fdopen(terminal, "rb", buffering=0) as file, contextlib.suppress(OSError):  # EIO: nobody writes any more
        while part := file.read(1 << 16):
            found += part
    return found


@pytest.mark.slow
def test_as_it_is_run(choice, text, tmp_path):
    """From a pipe: no bar; on a terminal a bar, and JSON alone on stdout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = [*choice, "--text", text, "--samples", 2, "--json"]
    command = list(map(str, [*COMMAND, EXAMPLE, tmp_path / "target", *options]))
    piped = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert (json.loads(piped.stdout)["written"], piped.stderr) == (True, "")
    shutil.rmtree(tmp_path / "target")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    watched = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True, env=environment)
    os.close(theirs)
    assert json.loads(watched.stdout)["written"]
    assert b"refit: 100%" in shown(ours)


def test_checkpoint_answers_like_the_masked_model(choice, chooser, tmp_path):
    gemma4q("prune", EXAMPLE, tmp_path / "target", *choice, "--recipe", "quota")
    prompt = [[2, *range(40, 90)]]
    got = MaskedModel(tmp_path / "target").run(prompt)
    expected = MaskedModel(EXAMPLE).run(prompt, chooser.uniform("quota").kept)
    assert rms_error(got.logprobs, expected.logprobs) < REFIT_KLD
    other = MaskedModel(EXAMPLE).run(prompt, UNIFORM)
    assert rms_error(got.logprobs, other.logprobs) > 1000 * REFIT_KLD
    assert isinstance(got.logprobs, torch.Tensor)
