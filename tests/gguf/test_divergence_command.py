"""`gguf-mixed divergence` and its base file, with the real llama-perplexity."""

import json
from dataclasses import replace

import pytest
import tolerances
from quantize_runs import llama, ok
from small_models import CHUNKS, CONTEXT, POSITIONS, quantize
from test_gguf_cli import gguf_mixed

from gguf_mixed.base_file import Comparison, ensure_base, record_path, remove_base
from gguf_mixed.errors import InputError
from gguf_mixed.identity import model_sha256
from gguf_mixed.llama_cpp import find_tool
from gguf_mixed.perplexity import base_bytes
from gguf_mixed.tensors import read_inventory

SIZE = ["--chunks", CHUNKS, "--context", CONTEXT, "--threads", 1]


@pytest.fixture
def comparison(llama_quantize, small_gguf, held_out_text):
    return Comparison(find_tool("llama-perplexity"), small_gguf("dense"), held_out_text, CHUNKS, CONTEXT, 1)


@pytest.fixture(scope="module")
def models(llama_quantize, small_gguf):
    return [small_gguf("dense"), *(quantize(llama_quantize, small_gguf("dense"), kind) for kind in ("Q6_K", "Q4_0"))]


def test_a_table_and_the_same_as_json(models, held_out_text, tmp_path):
    given = ["divergence", models[0], *models, "--text", held_out_text, *SIZE, "--base", tmp_path / "b.kld"]
    finished = ok(*given, "--json")
    report = json.loads(finished.stdout)
    size = base_bytes(1024, CHUNKS, CONTEXT)
    assert finished.stderr.startswith(f"base file {tmp_path / 'b.kld'}: {size:,} bytes")
    assert report["positions"] == POSITIONS
    same, fine, coarse = report["models"]
    assert abs(same["divergence"]["mean_kld"]) < tolerances.SELF_KLD_MEAN
    assert 0 < fine["divergence"]["mean_kld"] < coarse["divergence"]["mean_kld"]
    assert [each["file_bytes"] for each in report["models"]] == [path.stat().st_size for path in models]
    assert [each["sha256"] for each in report["models"]] == [model_sha256(read_inventory(path)) for path in models]
    finished = ok(*given)
    assert finished.stderr.startswith(f"base file {tmp_path / 'b.kld'}: {size:,} bytes, reused\n")
    assert [line.partition(":")[0] for line in finished.stderr.splitlines()[1:]] == [path.name for path in models]
    lines = [" ".join(line.split()) for line in finished.stdout.splitlines()]
    for path, each in zip(models, report["models"], strict=True):
        (line,) = (line for line in lines if line.startswith(path.name))
        found = each["divergence"]
        for said in (f"{each['bpw']:.3f}", f"{found['mean_kld']:.4f} ±{found['mean_kld_error']:.4f}"):
            assert said in line
        assert line.endswith(f"{found['p99_kld']:.3f} {found['same_top']:.1%}")


def test_without_a_name_the_base_is_removed(models, held_out_text, tmp_path):
    finished = ok("divergence", *models[:2], "--text", held_out_text, *SIZE, TMPDIR=str(tmp_path))
    assert str(tmp_path) in finished.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunks": 7}, f"made with chunks {CHUNKS}, expected 7"),
        ({"context": 64}, f"made with context {CONTEXT}, expected 64"),
    ],
)
def test_a_base_of_another_size_is_refused(comparison, tmp_path, change, message):
    path = tmp_path / "b.kld"
    written = ensure_base(comparison, path, print)
    assert ensure_base(comparison, path, print) == written
    with pytest.raises(InputError, match=message):
        ensure_base(replace(comparison, **change), path, print)
    assert ensure_base(comparison, path, print) == written


def test_a_base_of_another_text_or_model_is_refused(comparison, small_gguf, held_out_text, tmp_path):
    path, other = tmp_path / "b.kld", tmp_path / "other.txt"
    ensure_base(comparison, path, print)
    other.write_text(held_out_text.read_text()[1:])
    with pytest.raises(InputError, match=r"made with text held_out.txt \(\w{8}\), expected other.txt \("):
        ensure_base(replace(comparison, text=other), path, print)
    with pytest.raises(InputError, match=r"made with reference dense-f32.gguf \(\w{8}\), expected moe-f32.gguf \("):
        ensure_base(replace(comparison, reference=small_gguf("moe")), path, print)
    other.write_text(held_out_text.read_text())
    assert ensure_base(replace(comparison, text=other), path, print).path == path  # by content, not by name


def test_a_base_without_a_record_is_refused_and_left(comparison, tmp_path):
    path = tmp_path / "b.kld"
    path.write_bytes(b"somebody's")
    with pytest.raises(InputError, match=r"b.kld: exists, and no b.kld.json tells what it was made of"):
        ensure_base(comparison, path, print)
    record_path(path).write_text("[]")
    with pytest.raises(InputError, match=r"b.kld.json: not a record of format"):
        ensure_base(comparison, path, print)
    assert path.read_bytes() == b"somebody's"
    remove_base(path)
    assert not list(tmp_path.iterdir())


def test_the_size_is_compared_with_the_free_space(comparison, tmp_path):
    said = []
    too_many = replace(comparison, chunks=10**13)
    with pytest.raises(InputError, match=rf"takes {base_bytes(1024, 10**13, CONTEXT):,} bytes, and [\d,]+ are free"):
        ensure_base(too_many, tmp_path / "b.kld", said.append)
    assert not said and not list(tmp_path.iterdir())


def test_an_interrupted_base_is_made_again(comparison, tmp_path):
    """Killed while llama-perplexity writes, a record and a partial file are left."""
    path = tmp_path / "b.kld"
    killed = llama(tmp_path, "kill -KILL $PPID").with_name("llama-perplexity")
    (tmp_path / "tools" / "llama-quantize").rename(killed)
    given = ["divergence", comparison.reference, comparison.reference, "--text", comparison.text, *SIZE, "--base", path]
    assert gguf_mixed(*given, "--llama-cpp", killed.parent).returncode < 0
    assert not path.exists()
    ok(*given)
    assert path.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent.gguf", "absent.gguf: cannot be read"), ("text.txt", "text.txt: not a GGUF file")],
)
def test_bad_models_are_refused_before_anything_runs(models, held_out_text, tmp_path, name, message):
    (tmp_path / "text.txt").write_text("text")
    given = ["divergence", models[0], tmp_path / name, "--text", held_out_text, *SIZE, "--base", tmp_path / "b.kld"]
    finished = gguf_mixed(*given)
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
    assert message in finished.stderr
    assert not (tmp_path / "b.kld").exists()
