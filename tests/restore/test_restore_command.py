"""`gemma4q restore` as users run it: listing, JSON, refusals in one line. tests/crash kills it."""

import json
import shutil

import in_process
import pytest
from damage import change_quantization, load, quantize_towers, same, store


def gemma4q(*arguments, code=0):
    result = in_process.gemma4q(*arguments)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def damaged(sound, tmp_path_factory):
    folder = shutil.copytree(sound / "fp8", tmp_path_factory.mktemp("command") / "damaged")
    tensors = load(folder)
    quantize_towers(tensors)
    store(folder, tensors)
    change_quantization(folder, ignored_layers=["lm_head"])
    return folder


def test_dry_run_lists_and_writes_nothing(sound, damaged, tmp_path):
    output = gemma4q("restore", damaged, sound / "base", tmp_path / "target", "--dry-run").stdout
    lines = output.splitlines()
    assert "restore (quantized): model.embed_vision.embedding_projection.weight" in lines
    assert "drop: model.embed_vision.embedding_projection.weight_scale" in lines
    assert "drop: model.embed_vision.embedding_projection.input_scale" in lines
    assert "add to ignored_layers: model.embed_vision.embedding_projection" in lines
    assert lines[-1] == "Nothing was written (--dry-run)."
    assert not (tmp_path / "target").exists()


def test_mended(sound, damaged, tmp_path):
    output = gemma4q("restore", damaged, sound / "base", tmp_path / "target").stdout
    assert f"Wrote {tmp_path / 'target'}, verified against BASE." in output.replace("\n", " ")
    expected, got = load(sound / "fp8"), load(tmp_path / "target")
    assert set(got) == set(expected)
    assert all(same(got[name], expected[name]) for name in got)
    again = gemma4q("restore", damaged, sound / "base", tmp_path / "target").stdout
    assert "is already complete: nothing to do." in again


def test_json(sound, damaged, tmp_path):
    arguments = ["restore", damaged, sound / "base", tmp_path / "target", "--json"]
    planned = json.loads(gemma4q(*arguments, "--dry-run").stdout)
    done = json.loads(gemma4q(*arguments).stdout)
    assert (planned.pop("written"), done.pop("written")) == (False, True)
    assert planned == done
    assert done["method"] == "fp8"
    assert done["restored"]["model.embed_vision.embedding_projection.weight"] == "quantized"
    assert done["list"]["key"] == "ignored_layers"
    assert done["output_bytes"] == sum(path.stat().st_size for path in (tmp_path / "target").glob("*.safetensors"))


def test_a_sound_checkpoint_is_left_alone(sound, tmp_path):
    output = gemma4q("restore", sound / "fp8", sound / "base", tmp_path / "target").stdout
    assert f"{sound / 'fp8'} is sound: nothing to restore, nothing was written." in output
    assert not (tmp_path / "target").exists()
    report = json.loads(gemma4q("restore", sound / "fp8", sound / "base", tmp_path / "target", "--json").stdout)
    assert (report["needed"], report["written"]) == (False, False)


@pytest.mark.parametrize("target", ["base", "base/inside"])
def test_target_in_the_base_is_refused(sound, damaged, tmp_path, target):
    base = shutil.copytree(sound / "base", tmp_path / "base")
    before = sorted(base.iterdir())
    error = gemma4q("restore", damaged, base, tmp_path / target, code=2).stderr
    assert error.count("\n") == 1
    assert "must lie outside the source" in error
    assert sorted(base.iterdir()) == before


def test_swapped_arguments_are_refused(sound, damaged, tmp_path):
    error = gemma4q("restore", sound / "base", damaged, tmp_path / "target", code=2).stderr
    assert error == "error: config.json: got no quantization_config, expected a quantized checkpoint\n"
