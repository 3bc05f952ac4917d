"""`gemma4q sweep`: a rate written, served by a real vLLM and measured; again, and nothing is done twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = EXAMPLES / "small_gemma4" / "dense"
GEMMA4Q = Path(sys.executable).with_name("gemma4q")
KILLED = b"the last words of a killed run's engine"
sys.path.insert(0, str(EXAMPLES))

from small_gemma4 import held_out  # noqa: E402


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [GEMMA4Q, "sweep", MODEL, folder / "sweep", "--text", folder / "text.txt", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(held_out.natural_text()), encoding="utf-8")
    return tmp_path


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.usefixtures("few_vllm_processes")
def test_a_sweep(folder):
    """Attention at 5 bits, the rest at 4; the output layer left alone, which is most of so small a model."""
    wanted = ["--bits", "4.2", "--head-bits", "16", "--no-hessian", "--framing", "raw", "--context", "128"]
    (folder / "sweep").mkdir()
    (folder / "sweep" / "engine.log").write_bytes(KILLED)
    first = sweep(folder, *wanted, "--chunks", "6", "--json")
    assert first.returncode == 0, first.stderr
    assert first.stderr.splitlines() == ["exl3-4.2bpw-h16-mcg: measuring", "the original: measuring"]
    results = json.loads(first.stdout)
    (point,) = results["points"].values()
    manifest = json.loads((folder / "sweep" / "exl3-4.2bpw-h16-mcg" / "gemma4q-manifest.json").read_text())
    assert point["bpw"] == manifest["details"]["bits"]["layers"]["bpw"]
    assert 4 < point["bpw"] < 5.2
    kld, ppl = point["divergence"]["raw"], point["perplexity"]["raw"]
    assert kld["positions"] == ppl["positions"] == 6 * 63
    assert 1e-4 < kld["mean_kld"] < 0.05  # three bits cost 0.03, eight 0.0002
    assert abs(ppl["value"] / results["reference"]["perplexity"]["raw"]["value"] - 1) < 0.05
    assert (folder / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not list((folder / "sweep").glob("gemma4q-*"))

    log = (folder / "sweep" / "engine.log").read_bytes()
    assert log and KILLED not in log
    again = sweep(folder, *wanted, "--chunks", "6", "--json")
    assert again.returncode == 0 and json.loads(again.stdout) == results
    assert (folder / "sweep" / "engine.log").read_bytes() == log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --scheme exl3: --statistics is missing"),
        (["--no-hessian", "--bits", "9"], "error: bits: got 9, expected 1 to 8"),
        (["--no-hessian", "--chunks", "1000"], "error: text: got 28 windows of 512 tokens, expected 1000"),
    ],
    ids=["statistics", "bits", "chunks"],
)
def test_refusals(folder, arguments, message):
    finished = sweep(folder, *arguments)
    assert finished.returncode == 2
    assert finished.stderr.startswith(message)
    assert not (folder / "sweep").exists()
