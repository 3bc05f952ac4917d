"""`gemma4q evaluate gsm8k` that stops before its end, for any reason: one line, and the same command goes on.

The server is gsm8k_server.py; test_gsm8k_engine.py kills and resumes a run on `vllm serve`.
"""

import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gsm8k_server import COUNT, Chat, completion, mixed, right, serving

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.gsm8k.results import read_results, writing


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
