"""What `gemma4q prune` refuses: one clear line, exit code 2, and nothing left behind."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import made_statistics
import pytest
from prune_commands import content, gemma4q, refused
from prune_files import EXAMPLE, retained, write
from pruned_checkpoints import NON_UNIFORM, UNIFORM, prune
from vllm_plugin.checkpoints import edit

from vllm_gemma4q.calibration.work import Work
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.commands import prune_model
from vllm_gemma4q.pruned_moe.choose import NAMES
from vllm_gemma4q.pruned_moe.refit import Refit
from vllm_gemma4q.quark_int8 import quantize as quark_int8

DENSE = EXAMPLE.with_name("dense")
RUN = ("--samples", 2, "--max-length", 64)


@pytest.fixture
def choice(statistics_file):
    return ["--statistics", statistics_file, "--keep", 12]


@pytest.fixture
def drop_map(tmp_path_factory):
    path = tmp_path_factory.mktemp("map") / "drop.json"
    path.write_text(json.dumps(retained(NON_UNIFORM).to_json()))
    return path


@pytest.fixture
def no_model(monkeypatch):
    """Fails where a model is loaded: everything must be known before."""
    monkeypatch.setattr(prune_model, "load_decoder", None)


CHOICE, MAP, TEXT, TARGET = "choice", "map", "text", "target"
GIVEN = {
    CHOICE: lambda files: files["choice"],
    MAP: lambda files: ["--drop-map", files["map"]],
    TEXT: lambda files: ["--text", files["text"]],
    TARGET: lambda files: [files["target"]],
}
OPTIONS = {
    "neither": ([TARGET], r"expected either --keep N, with --statistics STATS, or --drop-map FILE"),
    "both": ([TARGET, CHOICE, MAP], r"expected either --keep N"),
    "statistics alone": ([TARGET, "--recipe", "v3"], r"expected either --keep N"),
    "no target": ([CHOICE], r"DST is missing: expected an output folder, or --scores-only, or --evaluate FILE"),
    "target and scores": ([TARGET, CHOICE, "--scores-only"], r"DST: got .*target, expected none"),
    "target and judging": ([TARGET, CHOICE, "--evaluate", "x"], r"DST: got .*target, expected none"),
    "recipe": ([TARGET, CHOICE, "--recipe", "v9"], r"recipe v9: expected one of v3, v4, v5-coder, reap"),
    "other recipe": ([CHOICE, "--evaluate", "x", "--compare", "v9"], r"recipe v9: expected one of v3"),
    "no statistics": ([TARGET, "--keep", 12], r"--statistics is missing: what gemma4q calibrate wrote"),
    "too few": ([TARGET, CHOICE, "--keep", 3], r"--keep: got 3, expected 4 \(top_k\)..16"),
    "none": ([TARGET, CHOICE, "--keep", 0], r"--keep: got 0, expected 4"),
    "too many": ([TARGET, CHOICE, "--keep", 17], r"--keep: got 17, expected 4 \(top_k\)..16"),
    "top-k": ([TARGET, CHOICE, "--top-k", 13], r"--keep: got 12, expected 13 \(top_k\)..16"),
    "top-k of a map": ([TARGET, MAP, "--top-k", 10], r"drop.json: layer 1: 9 of 16 experts left, expected at least 10"),
    "top-k of none": ([TARGET, CHOICE, "--top-k", 0], r"top-k: got 0, expected at least 1"),
    "boost": ([TARGET, CHOICE, "--shared-boost", "nan"], r"shared boost: got nan, expected a finite number above 0"),
    "transfer": ([TARGET, CHOICE, "--soft-transfer", 2], r"soft transfer: got 2.0, expected a share"),
    "spread without text": ([TARGET, CHOICE, "--spread"], r"--spread: --text is missing: what a layer loses is"),
    "compare what": ([TARGET, CHOICE, "--compare", "v3"], r"--compare: --evaluate is missing"),
    "scores and judging": ([CHOICE, "--scores-only", "--evaluate", "x"], r"--scores-only: got also --text, --spread"),
    "scores and text": ([CHOICE, "--scores-only", TEXT], r"--scores-only: got also --text, --spread or --evaluate"),
    "map and spread": ([TARGET, MAP, TEXT, "--spread"], r"--drop-map: got also --spread, which recipes take"),
    "map and scores": ([MAP, "--scores-only"], r"--drop-map: got also --scores-only"),
    "map and picture": ([TARGET, MAP, "--plot", "x.png"], r"--drop-map: got also --plot"),
    "map and others": ([MAP, "--evaluate", "x", "--compare", "v3"], r"--drop-map: got also --compare"),
    "map and weights": ([TARGET, MAP, "--class-weight", "a=1"], r"--drop-map: got also --class-weight"),
    "class": ([TARGET, CHOICE, "--class-weight", "poems=2"], r"class poems: not calibrated on, expected one of"),
    "class weight": ([TARGET, CHOICE, "--class-weight", "text.txt"], r"--class-weight: got text.txt, expected TEXT=W"),
    "negative weight": ([TARGET, CHOICE, "--class-weight", "text.txt=-1"], r"--class-weight: got text.txt=-1"),
    "no number": ([TARGET, CHOICE, "--class-weight", "text.txt=nan"], r"--class-weight: got text.txt=nan, expected"),
    "no text": ([TARGET, CHOICE, "--text", "absent.txt"], r"absent.txt: cannot be read"),
    "size": ([TARGET, CHOICE, "--max-shard-size", "much"], r"size 'much'"),
    "work": ([CHOICE, "--evaluate", "x", "--work", "absent"], r"--work: absent: not a folder"),
    "no map": ([TARGET, "--drop-map", "absent.json"], r"absent.json: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case, choice, drop_map, text, tmp_path):
    arguments, message = OPTIONS[case]
    files = {"choice": choice, "map": drop_map, "text": text, "target": tmp_path / "target"}
    expanded = [part for given in arguments for part in GIVEN.get(given, lambda _, given=given: [given])(files)]
    line = refused("prune", EXAMPLE, *expanded)
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir())


def test_exit_code_and_stderr(tmp_path):
    command = [Path(sys.executable).with_name("gemma4q"), "prune", EXAMPLE, tmp_path / "target", "--keep", "3"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "error: --keep: got 3, expected 4 (top_k)..16\n"


def test_models(choice, drop_map, text, tmp_path):
    target = tmp_path / "target"
    for given in (["--keep", 12, "--recipe", "random"], ["--drop-map", drop_map], choice):
        assert "config.json: got a dense model, expected one with experts" in refused("prune", DENSE, target, *given)
    pruned_before = prune(EXAMPLE, tmp_path / "pruned", NON_UNIFORM)
    for given in (["--keep", 8, "--recipe", "random"], ["--drop-map", drop_map], choice):
        line = refused("prune", pruned_before, target, *given)
        assert "(num_experts_per_layer), expected a checkpoint that was not pruned" in line
    assert "absent: not a folder" in refused("prune", tmp_path / "absent", target, *choice)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned"]


def test_statistics(choice, text, tmp_path):
    target, statistics = tmp_path / "target", tmp_path / "statistics"
    other = prune(EXAMPLE, tmp_path / "other", UNIFORM)
    gemma4q("calibrate", DENSE, statistics, "--text", text, *RUN)
    of_dense = ["--statistics", statistics, *choice[2:]]
    assert "statistics of another model: dense" in refused("prune", EXAMPLE, target, *of_dense)
    assert "statistics of another model: moe" in refused("prune", other, target, *choice)
    write(quark_int8.plan(open_checkpoint(EXAMPLE)), tmp_path / "int8")
    assert "statistics: statistics of a dense model" in refused("prune", tmp_path / "int8", target, *of_dense)
    made_statistics.write_for(EXAMPLE, tmp_path / "damaged")
    assert "damaged: statistics of a dense model" in refused(
        "prune", EXAMPLE, target, "--statistics", tmp_path / "damaged", *choice[2:]
    )
    absent = ["--statistics", tmp_path / "absent", *choice[2:]]
    assert "absent: cannot be read as a statistics file" in refused("prune", EXAMPLE, target, *absent)
    assert not target.exists()


def test_quantized_sources_cannot_be_run(choice, drop_map, text, tmp_path):
    write(quark_int8.plan(open_checkpoint(EXAMPLE)), tmp_path / "int8")
    before, target = content(tmp_path), tmp_path / "target"
    message = "config.json: got a quantized checkpoint, and --text and --evaluate run the model, which takes BF16, F16 "
    for given in (choice, ["--drop-map", drop_map]):
        assert message in refused("prune", tmp_path / "int8", target, *given, "--text", text, *RUN)
        assert message in refused("prune", tmp_path / "int8", *given, "--evaluate", text, *RUN)
    line = refused("prune", tmp_path / "int8", target, "--keep", 12, "--recipe", "magnitude")
    assert re.search(r"tensor .*: got I8, expected one of BF16", line), line
    assert content(tmp_path) == before
    gemma4q("prune", tmp_path / "int8", target, *choice)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("how", ["full", "file", "inside", "around", "work"])
def test_targets_that_no_refit_is_made_for(how, choice, text, tmp_path, monkeypatch):
    """Known before anything is computed."""
    monkeypatch.setattr(prune_model.PrunedModel, "details", lambda self: {})
    source = shutil.copytree(EXAMPLE, tmp_path / "around" / "source")
    target, work = tmp_path / "target", tmp_path / "target.work"
    if how == "file":
        target.write_text("mine")
    elif how in ("full", "work"):
        folder = {"full": target, "work": work}[how]
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    target = {"inside": source / "target", "around": tmp_path / "around"}.get(how, target)
    before = content(tmp_path)
    line = refused("prune", source, target, *choice, "--text", text, *RUN)
    expected = {
        "full": "target: not empty, and not an unfinished run of this command",
        "work": "target.work: not empty, and not an unfinished run of this command",
        "file": "target: exists and is not a folder",
        "inside": "the target must lie outside the source",
        "around": "the target must lie outside the source",
    }
    assert expected[how] in line
    assert content(tmp_path) == before


def test_target_that_is_not_empty_without_a_refit(choice, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "not empty, and not an unfinished run" in refused("prune", EXAMPLE, tmp_path, *choice)
    assert list(content(tmp_path)) == ["notes.txt"]


def test_places_are_looked_at_before_losses_are_measured(choice, text, tmp_path, no_model):
    """--spread runs the model for hours, and nothing of it is kept."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    absent = tmp_path / "absent" / "x"
    for target, option, expected in (
        ("full", [], "full: not empty, and not an unfinished run of this command"),
        ("target", ["--work", tmp_path / "full"], "full: not empty, and not an unfinished run of this command"),
        ("target", ["--plot", absent], "absent/x: cannot be written: No such file or directory"),
        ("target", ["--drop-map-output", absent], "absent/x: cannot be written: No such file or directory"),
    ):
        spread = ["prune", EXAMPLE, tmp_path / target, *choice, "--spread", "--text", text, *RUN]
        assert expected in refused(*spread, *option)
    assert list(content(tmp_path)) == ["full/notes.txt"]


def test_room_for_activations_is_looked_for(choice, text, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    line = refused("prune", EXAMPLE, "--evaluate", text, *choice, *RUN, "--activations-limit", "1kB")
    assert re.search(r": activations take [\d,]+ bytes, and 1,000 are free: fewer --samples, ", line), line


def test_too_little_text(choice, tmp_path):
    (tmp_path / "words.txt").write_text("A few words.")
    for given in ([tmp_path / "target", "--text"], ["--evaluate"]):
        line = refused("prune", EXAMPLE, *given, tmp_path / "words.txt", *choice, *RUN)
        assert re.search("words.txt: text: got .* tokens, expected", line), line
    assert list(content(tmp_path)) == ["words.txt"]


def test_started_twice(choice, text, tmp_path, monkeypatch):
    """The second is told so, and the first goes on."""
    command = ["prune", EXAMPLE, tmp_path / "target", *choice, "--text", text, *RUN]
    run, lines = Refit.run, []

    def run_and_start_again(self, progress):
        if not lines:
            lines.append("")
            lines[0] = refused(*command)
        run(self, progress)

    monkeypatch.setattr(Refit, "run", run_and_start_again)
    assert "refitted.\nWrote" in gemma4q(*command)
    assert lines == [f"{tmp_path / 'target.work'}: another run is writing here"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_work_of_another_refit(choice, text, tmp_path, monkeypatch):
    """A killed run's folder is taken up by the same command alone."""
    command = ["prune", EXAMPLE, tmp_path / "target", *choice, "--text", text]
    write_tensors = Work.write_tensors

    def interrupted(self, name, tensors):
        write_tensors(self, name, tensors)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "write_tensors", interrupted)
        with pytest.raises(AssertionError):
            gemma4q(*command, *RUN)
    before = content(tmp_path)
    assert "target.work/layer-00000.safetensors" in before
    other = "target.work: holds an unfinished run with another {}; remove it to start anew"
    assert other.format("texts") in refused(*command, "--samples", 3, "--max-length", 64)
    assert other.format("retained") in refused(*command, *RUN, "--recipe", "random")
    assert other.format("options") in refused(*command, *RUN, "--top-k", 3)
    assert content(tmp_path) == before
    assert "refitted.\nWrote" in gemma4q(*command, *RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert "not empty, and not an unfinished run" in refused(*command, *RUN, "--recipe", "random")


def test_answers_that_are_not_finite(text, tmp_path):
    name = "model.language_model.layers.1.experts.gate_up_proj"
    source = tmp_path / "source"
    edit(EXAMPLE, source, lambda tensors: tensors | {name: tensors[name] * float("nan")})
    options = ["--keep", 12, "--recipe", "random", *RUN]
    line = refused("prune", source, tmp_path / "target", *options, "--text", text)
    assert "refit: the model's activations are not finite: try --dtype float32" in line
    assert "answers are not finite" in refused("prune", source, *options, "--evaluate", text, "--compare", "random")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_names_of_recipes_are_those_of_the_help():
    printed = gemma4q("prune", "--help")
    words = set(re.findall(r"[\w-]+", printed))
    assert set(NAMES) <= words
