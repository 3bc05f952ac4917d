"""`gemma4q evaluate gsm8k --url`: requests, counting, comparing, refusing.

The server is a small one of this test's (gsm8k_server.py), which speaks the protocol over HTTP and can be told to fail;
test_gsm8k_engine.py does the same with `vllm serve`.
"""

import re
import sys

import pytest
from gsm8k_server import COUNT, Chat, completion, mixed, right, serving

from vllm_gemma4q.evaluation.gsm8k.results import read_results


def test_kinds_of_replies_are_counted_apart(gsm8k, files, tmp_path):
    with serving(Chat(mixed)) as url:
        code, found, err = gsm8k("--url", url, *files, "--results", tmp_path / "r", "--json")
        _, table, _ = gsm8k("--url", url, *files, "--results", tmp_path / "r")
    assert (code, err) == (0, "")  # no progress bar: this is no terminal
    counts = ("correct", "wrong", "truncated", "empty", "error")
    assert [found["strict"][key] for key in counts] == [4, 2, 1, 2, 3]
    assert [found["flexible"][key] for key in counts] == [5, 1, 1, 2, 3]
    assert found["strict"]["accuracy"] == 4 / 9 and found["strict"]["replies"] == 9
    assert found["cut_by_max_tokens"] == 2 and found["tokens"] == 5 * 9
    assert found["run"]["model"] == {"name": "pen-counter", "root": None}
    row = next(line for line in table.splitlines() if "flexible" in line)
    assert re.findall(r"[\d.]+%?", row) == ["55.56%", "26.67%", "81.12%", "5", "1", "1", "2", "3"]
    assert "ask these questions again" in table
    errors = {index: reply.error for index, reply in read_results(tmp_path / "r").replies.items() if reply.error}
    assert errors[6].startswith("HTTP 400: ") and "prompt too" in errors[6] and sorted(errors) == [6, 8, 9]


def test_requests(gsm8k, files, tmp_path):
    chat = Chat(models=("other", "mine"))
    with serving(chat) as url:
        options = ("--max-tokens", "77", "--num-shots", "3", "--limit", "4", "--model", "mine")
        assert gsm8k("--url", url + "/", *files, *options, "--results", tmp_path / "r")[0] == 0
    assert len(chat.bodies) == 4
    for body in chat.bodies:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("mine", 0, 77)
        assert body["stop"] == ["Question:", "</s>", "<|im_end|>"]
        assert [message["role"] for message in body["messages"]] == ["user", "assistant"] * 3 + ["user"]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_concurrency(gsm8k, files, tmp_path, concurrency):
    chat = Chat(seconds=0.05)
    with serving(chat) as url:
        gsm8k("--url", url, *files, "--results", tmp_path / "r", "--concurrency", concurrency)
    assert chat.most_in_flight == concurrency


def test_a_busy_server_is_asked_again(gsm8k, files, tmp_path):
    def busy(n, attempt):
        if n == 3 and attempt == 1:
            raise ConnectionError
        return (503, {"error": "busy"}) if n == 5 and attempt <= 2 else completion(right(n))

    chat = Chat(busy)
    with serving(chat) as url:
        _, found, _ = gsm8k("--url", url, *files, "--results", tmp_path / "r", "--json")
    assert found["strict"]["correct"] == COUNT
    assert {n: tries for n, tries in chat.attempts.items() if tries > 1} == {3: 2, 5: 3}


def test_a_server_that_fails_every_request_ends_the_run(gsm8k, files, tmp_path):
    chat = Chat(lambda n, attempt: (400, {"error": {"message": "maximum context length is 12"}}))
    with serving(chat) as url:
        code, _, err = gsm8k("--url", url, *files, "--results", tmp_path / "r", "--concurrency", "1")
    assert code == 2 and len(chat.bodies) == 10
    assert re.fullmatch(r"error: \S+: 10 requests in a row failed, the last with HTTP 400: .*length is 12.*\n", err)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_does_not_know_us_ends_the_run(gsm8k, files, tmp_path, status):
    with serving(Chat(lambda n, attempt: (status, {"error": {"message": "who?"}}))) as url:
        code, _, err = gsm8k("--url", url, *files, "--results", tmp_path / "r")
    assert code == 2 and f"model pen-counter: HTTP {status}: " in err and err.count("\n") == 1


def test_baseline_against_quantized(gsm8k, files, tmp_path, monkeypatch):
    """5 lost, 1 gained of 12, by --baseline, by the environment, and from two files without any server."""
    with serving(Chat(lambda n, attempt: completion("#### 0" if n == 11 else right(n)))) as url:
        gsm8k("--url", url, *files, "--results", tmp_path / "bf16")
    worse = Chat(lambda n, attempt: completion("#### 0" if n < 5 else right(n)), models=("quantized",))
    with serving(worse) as url:
        arguments = ("--url", url, *files, "--results", tmp_path / "int4", "--json")
        _, found, _ = gsm8k(*arguments, "--baseline", tmp_path / "bf16")
        monkeypatch.setenv("EVAL_BASELINE_JSON", str(tmp_path / "bf16"))
        assert gsm8k(*arguments)[1] == found
        monkeypatch.setenv("EVAL_BASELINE_JSON", str(tmp_path / "int4"))
        assert gsm8k(*arguments)[1]["comparison"] is None  # a baseline is not compared with itself
    monkeypatch.setenv("EVAL_BASELINE_JSON", str(tmp_path / "bf16"))
    monkeypatch.setenv("EVAL_QUANT_JSON", str(tmp_path / "int4"))
    assert gsm8k("--json")[1] == found
    pair = found["comparison"]["strict"]
    assert (pair["pairs"], pair["lost"], pair["gained"]) == (12, 5, 1)
    assert pair["difference"] == pytest.approx(-4 / 12) and pair["p_value"] == pytest.approx(14 / 64)
    text = gsm8k()[1]
    assert "-33.33 points" in text and "5 lost and 1 gained of 12, McNemar's exact p = 0.219" in text


def test_a_baseline_that_cannot_be_paired_is_refused_before_the_run(gsm8k, files, tmp_path):
    chat = Chat()
    with serving(chat) as url:
        gsm8k("--url", url, *files, "--results", tmp_path / "short", "--limit", "3")
        arguments = ("--url", url, *files, "--results", tmp_path / "r", "--baseline")
        for baseline, expected in (("short", "short: questions: "), ("none", "none: No such file")):
            code, _, err = gsm8k(*arguments, tmp_path / baseline)
            assert code == 2 and expected in err
    assert len(chat.bodies) == 3


def test_bad_options(gsm8k, files, tmp_path, monkeypatch):
    out = ("--results", str(tmp_path / "r"))
    cases = [
        ((), "expected CKPT or --url, or neither and two finished result files"),
        ((*out, "--baseline", str(tmp_path / "r")), "as for --results, expected the results of another model"),
        (files[:2], "--results: missing"),
        (out + files, "CKPT: missing, expected CKPT or --url"),
        (("--url", "http://x/v1", str(tmp_path), *out, *files), "--url: got also CKPT"),
        (
            ("--url", "http://x/v1", *out),
            "--questions, --shots: missing: nothing is downloaded silently; get both with",
        ),
        (("--url", "http://x/v1", *out, *files[:2]), "error: --shots: missing: nothing is downloaded"),
        (("--url", "http://x/v1", "--serve-flag=--a", *out, *files), "--serve-flag: got also --url"),
        (("--url", "localhost:8000", *out, *files), "--url: got localhost:8000, expected http://HOST:PORT/v1"),
        *(
            (("--url", url, *out, *files), f"error: --url: got {url}, expected http://HOST:PORT/v1")
            for url in ("http://localhost:abc/v1", "http://localhost:99999/v1", "http:///v1", "http://[zz]/v1")
        ),
        ((str(tmp_path), "--model", "a", *out, *files), "--model: got also CKPT"),
        ((str(tmp_path / "none"), *out, *files), "none"),
    ]
    for arguments, expected in cases:
        code, _, err = gsm8k(*arguments)
        assert code == 2 and expected in err and err.count("\n") == 1, err
    with serving(Chat(models=("a", "b"))) as url:
        code, _, err = gsm8k("--url", url, *out, *files)
        assert code == 2 and "--model: got None, expected one of a, b" in err
        code, _, err = gsm8k("--url", url[:-3], *out, *files)
        assert code == 2 and "no list of models, expected OpenAI's API; the URL ends in /v1" in err
    assert not (tmp_path / "r").exists()


def test_without_openai(gsm8k, files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    code, _, err = gsm8k("--url", "http://x/v1", *files, "--results", tmp_path / "r")
    assert (code, err) == (2, "error: openai: not installed: pip install 'vllm-gemma4q[evaluate]'\n")
