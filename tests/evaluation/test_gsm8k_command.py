"""`gemma4q evaluate gsm8k --url`: requests, counting, resuming, comparing, refusing.

The server is a small one of this test's (gsm8k_server.py), which speaks the protocol over HTTP and can be told to fail;
test_gsm8k_engine.py does the same with `vllm serve`.
"""

import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gsm8k_server import Chat, completion, right, serving, write_questions

import vllm_gemma4q.cli
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.gsm8k.results import read_results, writing

COUNT = 12


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("EVAL_BASELINE_JSON", "EVAL_QUANT_JSON", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def files(tmp_path):
    questions = write_questions(tmp_path / "questions.jsonl", COUNT)
    shots = write_questions(tmp_path / "shots.jsonl", 9, first=100)
    return ("--questions", str(questions), "--shots", str(shots))


@pytest.fixture
def gsm8k(monkeypatch, capfd):
    """Runs the command: exit code, stdout (parsed with --json), stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gemma4q", "evaluate", "gsm8k", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            vllm_gemma4q.cli.main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, json.loads(out) if out and "--json" in arguments else out, err

    return run


def mixed(n, attempt):
    """One of each kind of reply."""
    kinds = {
        1: completion(f"#### {3 * n + 3}"),
        2: completion(f"It is {3 * n + 2}."),
        3: completion("It goes on and", "length"),
        4: completion(""),
        5: completion(None),
        6: (400, {"error": {"message": "prompt too\nlong", "code": 400}}),
        7: completion(right(n), "length"),
        8: {**completion(""), "choices": []},
        9: "<html>",
    }
    return kinds.get(n, completion(right(n)))


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


def test_only_failed_and_new_questions_are_asked_by_the_next_run(gsm8k, files, tmp_path):
    chat = Chat(lambda n, attempt: (400, {"error": "no"}) if n in (2, 7) and attempt == 1 else completion(right(n)))
    with serving(chat) as url:
        arguments = ("--url", url, *files, "--results", tmp_path / "r", "--json")
        assert gsm8k(*arguments)[1]["strict"]["error"] == 2
        assert gsm8k(*arguments)[1]["strict"]["correct"] == COUNT
        assert gsm8k(*arguments)[1]["strict"]["correct"] == COUNT
    assert {n: tries for n, tries in chat.attempts.items() if tries > 1} == {2: 2, 7: 2}


def test_a_server_that_dies_leaves_a_file_to_go_on_with(gsm8k, files, tmp_path):
    def dies(n, attempt):
        if n >= 6:
            raise ConnectionError
        return mixed(n, attempt)

    options = (*files, "--retries", "0", "--json")
    with serving(Chat(mixed)) as url:
        _, whole, _ = gsm8k("--url", url, *options, "--results", tmp_path / "whole")
    with serving(Chat(dies)) as url:
        code, out, err = gsm8k("--url", url, *options, "--results", tmp_path / "r", "--concurrency", "1")
        port = int(url.split(":")[2].split("/")[0])
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: http://\S+: no connection \(.+\); run the same command again to go on\n", err)
    assert sorted(read_results(tmp_path / "r").replies) == list(range(6))
    code, out, err = gsm8k("--url", url, *options, "--results", tmp_path / "r")
    assert code == 2 and "expected a running server" in err and err.count("\n") == 1
    chat = Chat(mixed)
    with serving(chat, port):
        _, resumed, _ = gsm8k("--url", url, *options, "--results", tmp_path / "r")
    assert sorted(chat.attempts) == list(range(6, COUNT))
    assert resumed == {**whole, "results": str(tmp_path / "r")}


def test_a_full_disk_ends_the_run(gsm8k, files, tmp_path):
    """As a limit of this process on sizes of files: the line that does not fit is cut, and asked again later."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(Chat()) as url:
        arguments = ("--url", url, *files, "--results", tmp_path / "r", "--json")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
        try:
            code, _, err = gsm8k(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (code, err) == (2, f"error: {tmp_path / 'r'}: File too large; run the same command again to go on\n")
        assert (tmp_path / "r").stat().st_size == 1500
        assert gsm8k(*arguments)[1]["strict"]["correct"] == COUNT


def test_a_server_that_hangs_ends_the_run(gsm8k, files, tmp_path):
    with serving(Chat(seconds=1)) as url:
        code, _, err = gsm8k("--url", url, *files, "--results", tmp_path / "r", "--retries", "0", "--timeout", "0.2")
    assert code == 2 and "no reply in time; run the same command again to go on" in err and err.count("\n") == 1


def test_interrupted(files, tmp_path):
    command = [Path(sys.executable).with_name("gemma4q"), "evaluate", "gsm8k", *files]
    with serving(Chat(seconds=0.3)) as url:
        command += ["--url", url, "--results", str(tmp_path / "r"), "--concurrency", "2"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not (tmp_path / "r").exists() or (tmp_path / "r").read_bytes().count(b"\n") < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
    assert process.stderr.read() == "interrupted: run the same command again to resume\n"
    assert 0 < len(read_results(tmp_path / "r").replies) < COUNT


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


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        (("--max-tokens", "9"), "max_tokens: 512, expected 9"),
        (("--limit", "5"), "questions: "),
        (("--num-shots", "2"), "prompt: "),
        (("--seed", "1"), "prompt: "),
    ],
)
def test_runs_are_not_mixed(gsm8k, files, tmp_path, changed, key):
    with serving(Chat()) as url:
        arguments = ("--url", url, *files, "--results", tmp_path / "r")
        gsm8k(*arguments)
        before = (tmp_path / "r").read_bytes()
        code, _, err = gsm8k(*arguments, *changed)
    assert code == 2 and f"r: results of another run: {key}" in err and err.count("\n") == 1
    assert (tmp_path / "r").read_bytes() == before


def test_models_are_not_mixed(gsm8k, files, tmp_path):
    for name, expected in (("one", 0), ("two", 2)):
        with serving(Chat(models=(name,))) as url:
            code, _, err = gsm8k("--url", url, *files, "--results", tmp_path / "r")
            assert code == expected
    assert "model: {'name': 'one', 'root': None}, expected {'name': 'two', 'root': None}" in err


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_cut_last_line_is_asked_again(gsm8k, files, tmp_path, cut):
    path, chat = tmp_path / "r", Chat()
    with serving(chat) as url:
        arguments = ("--url", url, *files, "--results", path, "--json", "--concurrency", "1")
        whole, content = gsm8k(*arguments)[1], path.read_bytes()
        path.write_bytes(content[:-cut])
        assert gsm8k(*arguments)[1] == whole
    assert path.read_bytes() == content
    assert COUNT < len(chat.bodies) <= COUNT + 3


def test_a_cut_first_line_begins_anew_and_other_files_are_kept(gsm8k, files, tmp_path):
    path = tmp_path / "r"
    with serving(Chat()) as url:
        arguments = ("--url", url, *files, "--results", path)
        path.write_text('{"format": "gem')
        assert gsm8k(*arguments)[0] == 0
        for content in ("a diary", "a diary\n", '{"format": "other"}\n'):
            path.write_text(content)
            code, _, err = gsm8k(*arguments)
            assert code == 2 and err.startswith(f"error: {path}: ") and path.read_text() == content


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{}", "line 2: question None, expected a number below 3"),
        ('{"question": 3, "expected": "1", "text": ""}', "line 2: question 3, expected a number below 3"),
        ('{"question": 1, "expected": "1", "text": 4}', "line 2: key text: got 4, expected a string"),
        ("{", "line 2: not a JSON object"),
    ],
)
def test_damaged_results(tmp_path, line, expected):
    with (
        writing(tmp_path / "r", {"questions": {"count": 3}}),
        pytest.raises(InputError, match="another run is writing"),
    ):
        writing(tmp_path / "r", {"questions": {"count": 3}}).__enter__()
    with (tmp_path / "r").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=expected):
        read_results(tmp_path / "r")


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
