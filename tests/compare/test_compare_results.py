"""Which figures stand beside which: by digest, by protocol, and nothing else."""

import json
import re

import pytest
from compare_files import TEXT, text_results

from vllm_gemma4q.compare.model import open_model
from vllm_gemma4q.evaluation.gsm8k.answers import Reply
from vllm_gemma4q.evaluation.gsm8k.report import report
from vllm_gemma4q.evaluation.gsm8k.results import Results

SCORE = {"accuracy": 0.5, "interval": [0.4, 0.6]}  # of a running server, whose model has no digest


def gsm8k_results(path, model, right, **identity):
    """As `gemma4q evaluate gsm8k --json` prints it, of ten questions."""
    run = {
        "model": open_model(model).identity,
        "serve_flags": ["--max-model-len", str(4096 + right)],
        "questions": {"count": 10, "sha256": "0" * 64},
        "prompt": {"sha256": "1" * 64, "shots": 8},
        "max_tokens": 512,
        **identity,
    }
    replies = {index: Reply(f"#### {index}", "stop", 5, None) for index in range(10)}
    expected = {index: str(index if index < right else -1) for index in range(10)}
    path.write_text(json.dumps(report(Results(path, run, replies, expected))))
    return path


def gguf_divergence(path, model, reference, **changes):
    """As `gguf-mixed divergence --json` prints it."""
    kld = {f"{name}_kld": 0.01 for name in ("median", "p90", "p95", "p99", "p999", "max")}
    same = {"same_top": 0.9, "same_top_error": 0.01, "chunks": 4, "positions": 1020}
    ppl = {"perplexity": 9.5, "perplexity_error": 0.1, "base_perplexity": 9.0}
    measured = {"mean_kld": 0.02, "mean_kld_error": 0.001, **kld, **same, **ppl}
    found = {"model": str(model), "sha256": open_model(model).sha256, "divergence": measured}
    document = {"format": "gguf-mixed base 1", "reference": reference, "text": TEXT, "chunks": 4, "context": 512}
    path.write_text(json.dumps({**document, "models": [found], **changes}))
    return path


def test_figures_are_those_of_the_file_and_missing_ones_null(compare, run, base, int8, gguf, tmp_path):
    path = text_results(tmp_path / "kld.json", [int8], base, noise_floor=2e-4)
    written = json.loads(path.read_text())
    [group] = compare(base, int8, gguf, "--result", path)["text"]
    kld = written["checkpoints"][str(int8)]["divergence"]["raw"]
    assert group["figures"][str(int8)]["divergence"] == kld
    assert group["figures"][str(int8)]["perplexity"] == written["checkpoints"][str(int8)]["perplexity"]["raw"]
    assert group["figures"][str(gguf)] == {"perplexity": None, "divergence": None, "engine": None}
    assert group["reference_perplexity"] == written["checkpoints"][str(base)]["perplexity"]["raw"]
    assert group["noise_floor"] == written["noise_floor"]["raw"]
    out = run("compare", base, int8, gguf, "--result", path)[1]
    rows = {name: next(line for line in out.splitlines() if f" {name} " in line) for name in ("small", "small-int8")}
    for said in (f"{kld['mean_kld']:.5f} ± {kld['error']:.5f}", f"{kld['p99_kld']:.5f}", f"{kld['same_top']:.2%}"):
        assert said in rows["small-int8"]
    assert rows["small"].count("reference") == 3
    assert next(line for line in out.splitlines() if "Q8_0" in line).count("not measured") == 5
    assert "noise floor, the reference from itself: mean KLD 0.00020 ± 0.00001" in out
    assert (
        f"held_out.txt, 4 windows of 512 tokens (raw), vllm 0.32.0, divergence from small ({group_digest(group)})"
        in out
    )


def group_digest(group):
    return group["reference"]["sha256"][:8]


def test_models_are_matched_by_digest_not_by_name(run, base, int8, tmp_path):
    path = text_results(tmp_path / "kld.json", [int8], base)
    document = json.loads(path.read_text())
    document["checkpoints"][str(int8)]["model"]["sha256"] = "f" * 64
    path.write_text(json.dumps(document))
    code, _, err = run("compare", int8, "--result", path)
    own = open_model(int8).sha256[:8]
    assert code == 2
    assert err.endswith(f"small-int8 (ffffffff), expected of one of these models, small-int8 ({own})\n")
    del document["checkpoints"][str(int8)]["model"]
    path.write_text(json.dumps(document))
    assert "(no digest), expected of one of these models" in run("compare", int8, "--result", path)[2]


@pytest.mark.parametrize(
    "change",
    [
        {"context": 256},
        {"windows": {"raw": 5}},
        {"windows": {"chat": 4}},
        {"engine": {"name": "vllm", "version": "0.33.0"}},
        {"engine": {"name": "transformers", "version": "0.32.0"}},
        {"texts": [{**TEXT, "sha256": "cd" * 32}]},
        {"dtype": "float32"},
        {"tensor_parallel_size": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_protocols_stand_apart(compare, run, base, int8, gguf, tmp_path, change):
    one = text_results(tmp_path / "one.json", [int8], base)
    two = text_results(tmp_path / "two.json", [gguf], base, **change)
    arguments = (base, int8, gguf, "--result", one, "--result", two)
    first, second = compare(*arguments)["text"]
    assert first["figures"][str(gguf)]["perplexity"] is second["figures"][str(int8)]["divergence"] is None
    assert first["figures"][str(int8)]["divergence"] and second["figures"][str(gguf)]["divergence"]
    out = run("compare", *arguments)[1]
    assert re.findall(r"text [12], (?:raw|chat)(?=:)", out) == [
        f"text 1, {first['framing']}",
        f"text 2, {second['framing']}",
    ]


def test_a_text_under_another_name_is_the_same(compare, base, int8, gguf, tmp_path):
    one = text_results(tmp_path / "one.json", [int8], base)
    two = text_results(tmp_path / "two.json", [gguf], base, texts=[{**TEXT, "name": "copy.txt"}])
    [group] = compare(base, int8, gguf, "--result", one, "--result", two)["text"]
    assert group["figures"][str(int8)]["divergence"] and group["figures"][str(gguf)]["divergence"]


def test_divergences_from_another_reference_stand_apart(compare, base, int8, gguf, tmp_path):
    one = text_results(tmp_path / "one.json", [gguf], base)
    two = text_results(tmp_path / "two.json", [gguf], int8)
    groups = compare(base, int8, gguf, "--result", one, "--result", two)["text"]
    assert [group["reference"]["name"] for group in groups] == ["small", "small-int8"]


def test_perplexity_does_not_depend_on_a_reference(compare, base, int8, gguf, tmp_path):
    one = text_results(tmp_path / "one.json", [int8], base)
    two = text_results(tmp_path / "two.json", [gguf], seed=1)
    [group] = compare(base, int8, gguf, "--result", two, "--result", one)["text"]
    assert group["figures"][str(gguf)]["perplexity"] and group["figures"][str(gguf)]["divergence"] is None
    assert group["figures"][str(int8)]["divergence"]


def test_another_engine_within_a_run_is_named(compare, run, base, int8, gguf, tmp_path):
    engines = {gguf: {"name": "llama.cpp", "version": "b11434"}}
    path = text_results(tmp_path / "kld.json", [int8, gguf], base, engines=engines)
    [group] = compare(base, int8, gguf, "--result", path)["text"]
    assert group["figures"][str(gguf)]["engine"] == engines[gguf]
    lines = run("compare", base, int8, gguf, "--result", path)[1].splitlines()
    row = next(index for index, line in enumerate(lines) if "Q8_0" in line)
    assert lines[row + 1].count("llama.cpp b11434") == 2
    assert sum("llama.cpp" in line for line in lines) == 2


@pytest.mark.parametrize("reference", [True, False])
def test_two_figures_for_the_same_are_refused(run, base, int8, tmp_path, reference):
    one = text_results(tmp_path / "one.json", [int8], base)
    two = text_results(tmp_path / "two.json", [int8], base if reference else None, seed=1)
    code, _, err = run("compare", base, int8, "--result", one, "--result", two)
    assert (code, err.count("\n")) == (2, 1)
    assert "perplexity of " in err
    assert run("compare", base, int8, "--result", one, "--result", one)[0] == 0  # the same file twice is nothing new


def test_llama_perplexity_stands_apart_from_vllm(compare, base, int8, gguf, tmp_path):
    one = text_results(tmp_path / "one.json", [int8], base)
    two = gguf_divergence(tmp_path / "two.json", gguf, {"name": "small-f16.gguf", "sha256": "e" * 64})
    first, second = compare(base, int8, gguf, "--result", one, "--result", two)["text"]
    assert first["figures"][str(gguf)]["perplexity"] is None
    found = second["figures"][str(gguf)]
    assert (found["perplexity"]["value"], found["divergence"]["mean_kld"], found["divergence"]["error"]) == (
        9.5,
        0.02,
        0.001,
    )
    assert second["reference_perplexity"] is None  # a base file's is too low
    assert second["protocol"]["engine"] == {"name": "llama.cpp"}


def test_tiers_of_a_sweep(compare, run, gguf, tmp_path):
    path = gguf_divergence(tmp_path / "divergence.json", gguf, {"name": "f16.gguf", "sha256": "e" * 64})
    measured = json.loads(path.read_text())["models"][0]["divergence"]
    model = {"name": "optimal-4.gguf", "sha256": open_model(gguf).sha256}
    sweep = {
        "format": "gguf-mixed sweep 1",
        "inputs": {"model": {"name": "f16.gguf", "sha256": "e" * 64}},
        "evaluation": {"text": TEXT, "chunks": 4, "context": 512},
        "tiers": [{"name": "optimal-4", "model": model, "measured": measured}, {"name": "optimal-5", "measured": None}],
    }
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(sweep))
    [group] = compare(gguf, "--result", path)["text"]
    assert group["figures"][str(gguf)]["divergence"]["mean_kld"] == measured["mean_kld"]
    path.write_text(json.dumps({**sweep, "evaluation": None}))
    assert "holds plans only, expected a sweep that was measured (--text)" in run("compare", gguf, "--result", path)[2]


def test_rates_of_an_exl3_sweep(compare, base, int8, tmp_path):
    """Its reference has no digest, so its divergences are in no other file's group."""
    document = json.loads(text_results(tmp_path / "kld.json", [int8], base).read_text())
    point, original = document["checkpoints"][str(int8)], document["checkpoints"][str(base)]
    del original["model"]
    path = tmp_path / "sweep.json"
    points = {"exl3-4bpw": {"bpw": 4, "bytes": 5, **point}}
    path.write_text(
        json.dumps({"source": str(base), **document, "checkpoints": {}, "reference": original, "points": points})
    )
    groups = compare(base, int8, "--result", path, "--result", tmp_path / "kld.json")["text"]
    assert [group["figures"][str(int8)]["divergence"] is not None for group in groups] == [True, True]
    assert groups[0]["reference"] == {"name": "small"}
    assert groups[0]["reference_perplexity"] == original["perplexity"]["raw"]


def test_gsm8k_by_questions_and_prompt(compare, run, base, int8, gguf, tmp_path):
    files = [gsm8k_results(tmp_path / "base.json", base, 8), gsm8k_results(tmp_path / "int8.json", int8, 7)]
    given = [part for path in files for part in ("--result", path)]
    [group] = compare(base, int8, gguf, *given)["gsm8k"]
    assert [group["figures"][str(path)]["strict"]["accuracy"] for path in (base, int8)] == [0.8, 0.7]
    assert group["figures"][str(gguf)] is None
    out = run("compare", base, int8, gguf, *given)[1]
    assert "70.00% (39.68% to 89.22%)" in next(line for line in out.splitlines() if " small-int8 " in line)
    assert "GSM8K: 8-shot, 10 questions (00000000), strict answers, 95% interval" in out
    other = gsm8k_results(tmp_path / "other.json", gguf, 5, prompt={"sha256": "2" * 64, "shots": 0})
    assert len(compare(base, int8, gguf, *given, "--result", other)["gsm8k"]) == 2
    again = gsm8k_results(tmp_path / "again.json", int8, 6)
    code, _, err = run("compare", int8, "--result", files[1], "--result", again)
    assert code == 2 and "GSM8K of small-int8: an earlier --result has others; give one of them" in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": 1}, "got keys ['a'], expected what gemma4q evaluate .. --json, gemma4q sweep"),
        ({"protocol": {}, "checkpoints": {}}, "damaged: KeyError: 'windows', expected what gemma4q evaluate"),
        ({"protocol": {"windows": {}}, "checkpoints": {"x": {}}}, "damaged: KeyError: 'perplexity'"),
        ({"protocol": {"windows": {}, "context": 1, "texts": []}, "checkpoints": {}}, "damaged: KeyError: 'engine'"),
        ({"run": {"questions": {"count": 1}}, "strict": {}, "flexible": {}}, "damaged: KeyError: 'accuracy'"),
        ({"format": "gguf-mixed base 1", "models": [{}]}, "damaged: KeyError: 'model'"),
        (
            {"run": {"model": {"name": "x"}, "questions": {"count": 1}}, "strict": SCORE, "flexible": SCORE},
            "x (no digest)",
        ),
    ],
)
def test_what_is_no_result_file_is_refused(run, base, tmp_path, content, said):
    path = tmp_path / "what.json"
    path.write_text(json.dumps(content))
    code, out, err = run("compare", base, "--result", path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {path}: ") and said in err


def test_one_context_at_a_time(run, base):
    assert run("compare", base, "--context", "2K,4K")[2].startswith("error: --context 2K,4K: expected one number of")
    assert (
        "got 16384 tokens, expected at most 8192, the model's own limit" in run("compare", base, "--context", "16K")[2]
    )
