"""`gemma4q card`: what is in the manifest and in result files, and nothing else.

Figures are made with the classes that make them for users, of numbers given here.
"""

import json
import re
from pathlib import Path
from subprocess import CompletedProcess

import in_process
import numpy as np
import pytest
import yaml

from vllm_gemma4q.calibration.identity import model_identity
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.evaluation.distributions import compare
from vllm_gemma4q.evaluation.gsm8k.answers import Reply
from vllm_gemma4q.evaluation.gsm8k.report import report
from vllm_gemma4q.evaluation.gsm8k.results import Results
from vllm_gemma4q.evaluation.measure import Measured, Protocol
from vllm_gemma4q.evaluation.perplexity import perplexity
from vllm_gemma4q.evaluation.windows import Framing, Window
from vllm_gemma4q.quark_int8 import quantize

MODEL = Path(__file__).resolve().parents[2] / "examples" / "small_gemma4" / "dense"


def card(*arguments: object) -> "CompletedProcess[str]":
    return in_process.gemma4q("card", *arguments)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "small-int8"
    command = ["gemma4q", "quantize", "/secret/home/small", "/secret/home/small-int8", "--scheme", "quark-int8"]
    convert(quantize.plan(open_checkpoint(MODEL)), folder, command, lambda _: None)
    return folder


@pytest.fixture
def divergence_file(checkpoint, tmp_path):
    """As `gemma4q evaluate divergence --json` prints it."""
    windows = {Framing.RAW: [Window(list(range(9)), 5, 9)]}
    protocol = Protocol(windows, [{"name": "held_out.txt", "sha256": "0"}], 9)
    logprobs = np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5], [0.5, 0.5]], np.float32))
    logprobs.tofile(tmp_path / "reference")
    logprobs[:, ::-1].tofile(tmp_path / "other")
    one, two = (
        Measured({Framing.RAW: perplexity(logprobs[:, column])}, tmp_path / name, 2, 1.0)
        for column, name in enumerate(("reference", "other"))
    )
    kld = {Framing.RAW: compare(tmp_path / "reference", tmp_path / "other", 2)}
    document = {
        "protocol": protocol.to_json(),
        "reference": "original",
        "checkpoints": {
            "original": {"model": model_identity(open_checkpoint(MODEL)), **one.to_json()},
            "int8": {"model": model_identity(open_checkpoint(checkpoint)), **two.to_json(kld)},
        },
    }
    path = tmp_path / "divergence.json"
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def gsm8k_file(checkpoint, tmp_path):
    """As `gemma4q evaluate gsm8k --json` prints it: three of four right."""
    identity = {
        "model": model_identity(open_checkpoint(checkpoint)),
        "serve_flags": ["--max-model-len", "4096"],
        "questions": {"count": 4, "sha256": "0"},
        "prompt": {"sha256": "0", "shots": 8},
    }
    replies = {index: Reply(f"#### {index}", "stop", 5, None) for index in range(4)}
    results = Results(tmp_path / "gsm8k.jsonl", identity, replies, {0: "0", 1: "1", 2: "2", 3: "7"})
    path = tmp_path / "gsm8k.json"
    path.write_text(json.dumps(report(results)))
    return path


def front_matter(text: str) -> dict[str, object]:
    return yaml.safe_load(text.split("---\n")[1])


def test_without_results_nothing_is_claimed(checkpoint):
    finished = card(checkpoint, "-o", "-")
    assert finished.returncode == 0, finished.stderr
    text = finished.stdout
    assert front_matter(text) == {"tags": ["gemma4", "vllm", "vllm-gemma4q", "quark-int8"]}
    assert "# small-int8\n" in text and "W8A8 INT8" in text
    assert "Quality" not in text and "Serve" not in text and "perplexity" not in text
    assert "gemma4q quantize small small-int8 --scheme quark-int8" in text and "secret" not in text
    manifest = json.loads((checkpoint / "gemma4q-manifest.json").read_text())
    for role, row in manifest["summary"].items():
        assert f"| {role} | {row['parameters']:,} |" in text


def test_all_that_was_measured(checkpoint, divergence_file, gsm8k_file):
    known = ["--base-model", "google/gemma-4-31B-it", "--author", "someone", "--license", "apache-2.0"]
    finished = card(checkpoint, "-o", "-", "--result", divergence_file, "--result", gsm8k_file, *known)
    assert finished.returncode == 0, finished.stderr
    text, front = finished.stdout, front_matter(finished.stdout)
    assert front["base_model"] == "google/gemma-4-31B-it" and front["base_model_relation"] == "quantized"
    assert front["quantized_by"] == "someone" and front["license"] == "apache-2.0"
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.75
    found = json.loads(divergence_file.read_text())["checkpoints"]
    ppl, kld = found["int8"]["perplexity"]["raw"], found["int8"]["divergence"]["raw"]
    original = found["original"]["perplexity"]["raw"]["value"]
    assert f"| raw | 4 | {original:.4f} | {ppl['value']:.4f} ± {ppl['error']:.4f} | {kld['mean_kld']:.5f} ±" in text
    assert re.search(r"held_out\.txt, windows of 9 tokens, vllm \S+, dtype auto", text)
    assert "| strict | 75.00% | 30.06% to 95.44% | 0 | 0 | 0 |" in text  # Wilson's interval of 3 of 4
    assert "vllm serve small-int8   # vLLM " in text and "vllm serve small-int8 --max-model-len 4096" in text


def test_perplexity_alone_leaves_its_columns(checkpoint, divergence_file, tmp_path):
    document = json.loads(divergence_file.read_text())
    del document["reference"], document["checkpoints"]["original"], document["checkpoints"]["int8"]["divergence"]
    path = tmp_path / "perplexity.json"
    path.write_text(json.dumps(document))
    text = card(checkpoint, "-o", "-", "--result", path).stdout
    assert "| text as | tokens | perplexity ± standard error |" in text and "KLD" not in text


def test_another_models_figures_are_refused(checkpoint, divergence_file, gsm8k_file, tmp_path):
    for path in (divergence_file, gsm8k_file):
        own = model_identity(open_checkpoint(checkpoint))["sha256"]
        other = tmp_path / "other.json"
        other.write_text(path.read_text().replace(own, "f" * 64))
        finished = card(checkpoint, "-o", "-", "--result", other)
        assert finished.returncode == 2 and not finished.stdout
        assert finished.stderr.startswith(f"error: {other}: figures of ")
        assert f"expected of this checkpoint, small-int8 ({own[:8]})" in finished.stderr


def test_files_that_are_no_results(checkpoint, tmp_path):
    path = tmp_path / "what.json"
    path.write_text('{"a": 1}')
    finished = card(checkpoint, "--result", path)
    assert finished.returncode == 2 and "got keys ['a'], expected what gemma4q evaluate" in finished.stderr
    finished = card(MODEL)
    assert finished.returncode == 2 and "has no gemma4q-manifest.json" in finished.stderr


def test_a_written_card_is_not_overwritten(checkpoint, tmp_path):
    target = tmp_path / "README.md"
    assert card(checkpoint, "-o", target).stdout == f"Wrote {target}.\n"
    assert json.loads(card(checkpoint, "-o", target, "--json").stdout) == {
        "card": str(target), "picture": None, "results": 0
    }  # fmt: skip
    target.write_text("mine")
    finished = card(checkpoint, "-o", target)
    assert finished.returncode == 2 and "exists and is another" in finished.stderr
    assert target.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_commands_are_those_that_ran(checkpoint, divergence_file):
    document = json.loads(divergence_file.read_text())
    document["protocol"] |= {"dtype": "float16", "tensor_parallel_size": 2}
    divergence_file.write_text(json.dumps(document))
    text = card(checkpoint, "-o", "-", "--result", divergence_file).stdout
    assert "vllm serve small-int8 -tp 2 --dtype float16   # vLLM " in text
