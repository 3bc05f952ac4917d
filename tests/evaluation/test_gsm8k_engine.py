"""`gemma4q evaluate gsm8k` with `vllm serve`: what a kill -9 half-way leaves, and the same result after resuming."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gsm8k_server import write_questions

from vllm_gemma4q.evaluation.gsm8k.client import Patience
from vllm_gemma4q.evaluation.gsm8k.results import read_results
from vllm_gemma4q.evaluation.gsm8k.run import checkpoint_folder

ROOT = Path(__file__).resolve().parents[2]
DENSE = ROOT / "examples" / "small_gemma4" / "dense"
DATA = ROOT.parent / "shared" / "data"
COUNT = 40
GEMMA4Q = Path(sys.executable).with_name("gemma4q")

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# float32: in bfloat16, two tokens that are almost as likely may change places with the size of a batch.
FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "4096", "--max-num-seqs", "8")


@pytest.fixture(scope="module")
def url(few_vllm_processes, tmp_path_factory):
    """Of the server that a run on a checkpoint folder starts for itself."""
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    with checkpoint_folder(DENSE, FLAGS, Patience()).reached(log) as endpoint:
        yield endpoint.url


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """GSM8K itself where it is, else made-up questions."""
    folder, chosen = tmp_path_factory.mktemp("questions"), []
    for option, name, first in (("--questions", "gsm8k_test", 0), ("--shots", "gsm8k_train_200", 1000)):
        real = DATA / f"{name}.jsonl"
        chosen += [option, str(real if real.exists() else write_questions(folder / name, 60, first))]
    return chosen


def command(url, files, results):
    asked = [*files, "--limit", str(COUNT), "--max-tokens", "32", "--concurrency", "4"]
    return [GEMMA4Q, "evaluate", "gsm8k", "--url", url, *asked, "--results", str(results), "--json"]


def texts(path):
    return {index: (reply.text, reply.finish_reason) for index, reply in read_results(path).replies.items()}


def test_killed_half_way_and_resumed_as_if_never_stopped(url, files, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = json.loads(subprocess.run(command(url, files, whole), check=True, capture_output=True).stdout)

    process = subprocess.Popen(command(url, files, killed), stdout=subprocess.DEVNULL)
    while not killed.exists() or killed.read_bytes().count(b"\n") <= COUNT // 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = killed.read_bytes()
    assert COUNT // 4 < before.count(b"\n") < COUNT

    resumed = json.loads(subprocess.run(command(url, files, killed), check=True, capture_output=True).stdout)
    assert killed.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert resumed == {**expected, "results": str(killed)}
    assert texts(killed) == texts(whole)

    strict = expected["strict"]
    assert strict["error"] == 0 and strict["replies"] == COUNT
    assert sum(strict[kind] for kind in ("correct", "wrong", "truncated", "empty")) == COUNT
    # What the server counts: a reply that was cut has all its tokens.
    assert 32 * expected["cut_by_max_tokens"] <= expected["tokens"] <= 32 * COUNT
    assert any(text for text, _ in texts(whole).values())
    assert expected["run"]["model"] == {"name": "model", "root": str(DENSE)}
