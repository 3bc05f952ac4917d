"""`gemma4q calibrate` as it is run: what it writes and prints, and what it refuses in one line."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
from calibration_runs import small
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vllm_gemma4q import cli
from vllm_gemma4q.calibration.identity import check_same_model
from vllm_gemma4q.calibration.statistics import read_statistics
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.errors import InputError

OPTIONS = ["--samples", "4", "--max-length", "80"]


def run(*arguments):
    return CliRunner().invoke(cli.application(), ["calibrate", *map(str, arguments)])


def refused(*arguments):
    """The one line that a user would see."""
    found = run(*arguments)
    assert isinstance(found.exception, InputError), found.output
    return str(found.exception)


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(small("dense"), tmp_path / "model")


def changed(folder, **text_config):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text_config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_statistics_say_how_they_were_made(text, tmp_path):
    other, target = tmp_path / "other.txt", tmp_path / "s.safetensors"
    other.write_text(text.read_text()[:10_000])
    found = run(small("moe"), target, "--text", text, "--text", other, *OPTIONS, "--json")
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    statistics = read_statistics(target)
    assert {**statistics.details, "target": str(target), "written": True} == report
    assert (report["samples"], report["framing"], report["dtype"]) == (4, "chat template", "bfloat16")
    assert [described["name"] for described in report["texts"]] == ["text.txt", "other.txt"]
    texts, tokens = statistics.samples()
    assert texts.tolist() == [0, 0, 0, 1]
    assert tokens.sum() == report["tokens"]
    assert tokens.max() <= 80
    (experts, *_) = statistics.experts
    found = statistics.routing(experts)
    assert np.array_equal(found.sample_count.sum(axis=0), found.count)
    assert np.array_equal(found.sample_count.sum(axis=1), tokens * 4)
    check_same_model(statistics, open_checkpoint(small("moe")))
    with pytest.raises(InputError, match="statistics of another model: moe .*, expected dense"):
        check_same_model(statistics, open_checkpoint(small("dense")))


def test_plain_text_and_float32(text, tmp_path):
    target = tmp_path / "s.safetensors"
    found = run(small("moe"), target, "--text", text, *OPTIONS, "--raw", "--dtype", "float32")
    assert found.exit_code == 0, found.output
    assert found.stdout == f"{target}: 4 samples, 320 tokens, plain text\n"
    assert read_statistics(target).details["dtype"] == "float32"
    assert "nothing to do" in run(small("moe"), target, "--text", text, *OPTIONS, "--raw", "--dtype", "float32").stdout


def test_no_progress_where_nobody_watches(text, tmp_path):
    assert not sys.stderr.isatty()
    assert "token layer" not in run(small("moe"), tmp_path / "s", "--text", text, *OPTIONS).stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "words.txt: holds no text"),
        ("A few words.", "words.txt: text: got .* tokens, expected .* for 4 samples of 80"),
        (b"\xff\xfe\x00", "words.txt: cannot be read as text"),
    ],
)
def test_texts(content, message, tmp_path):
    words = tmp_path / "words.txt"
    words.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(small("dense"), tmp_path / "s", "--text", words, *OPTIONS)
    assert re.search(message, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["words.txt"]


def test_text_options(text, tmp_path):
    source, target = small("dense"), tmp_path / "s"
    assert "absent.txt: cannot be read" in refused(source, target, "--text", tmp_path / "absent.txt")
    assert "length: got 20 tokens" in refused(source, target, "--text", text, "--samples", 1, "--max-length", 20)
    assert "got 1 samples for 2 texts" in refused(source, target, "--text", text, "--text", text, "--samples", 1)
    assert "size 'much'" in refused(source, target, "--text", text, "--activations-limit", "much")


def test_models_that_are_not_supported(model, text, tmp_path):
    options = [tmp_path / "s", "--text", text, *OPTIONS]
    assert "not a folder" in refused(tmp_path / "absent", *options)
    assert "per-layer inputs" in refused(changed(model, hidden_size_per_layer_input=8), *options)
    assert "shared keys and values" in refused(
        changed(model, hidden_size_per_layer_input=0, num_kv_shared_layers=2), *options
    )
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "model_type is 'llama'" in refused(model, *options)


def test_damaged_models(model, text, tmp_path):
    options = [tmp_path / "s", "--text", text, *OPTIONS]
    shard = model / "model.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    assert "model.safetensors: truncated" in refused(model, *options)
    shard.write_bytes(content)
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(model, *options)


def test_weights_that_are_not_finite(model, text, tmp_path):
    weights = load_file(model / "model.safetensors")
    weights["model.language_model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    line = refused(model, tmp_path / "s", "--text", text, *OPTIONS)
    assert line.startswith("module model.language_model.layers.1.mlp.down_proj: its input is not finite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
