"""Thousands of damaged files, given to the project's real readers: each is read, or refused in one line.

GEMMA4Q_HOSTILE_SEED draws other files (CI draws the same ones every time), GEMMA4Q_HOSTILE_TIMES more of them. What a
failure prints repeats it: `python tests/hostile/campaign.py FOLDER --seed N --family NAME --case NUMBER`.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hostile.sandbox import Case, run_all

CAMPAIGN = Path(__file__).with_name("campaign.py")
SEED, TIMES = (os.environ.get(f"GEMMA4Q_HOSTILE_{name}", default) for name, default in (("SEED", "0"), ("TIMES", "1")))


def run(folder: Path, *options: str) -> dict[str, dict]:
    command = [sys.executable, CAMPAIGN, folder, "--seed", SEED, "--times", TIMES, *options]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert finished.stdout, finished.stderr[-3000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    problems = {name: family["problems"] for name, family in found["families"].items() if family["problems"]}
    assert not problems, f"seed {SEED}, files in {folder / 'problems'}: {json.dumps(problems, indent=1)[:5000]}"
    return found["families"]


def test_a_thousand_files(tmp_path):
    families = run(tmp_path, "--quick")
    assert sum(family["files"] for family in families.values()) >= 1000 * int(TIMES)
    for name in (
        "safetensors",
        "config",
        "gguf",
        "drop map",
    ):  # the damage is not such that all of it is refused at once
        assert {"0", "2"} <= families[name]["codes"].keys(), (name, families[name]["codes"])


@pytest.mark.slow
def test_ten_thousand_files(tmp_path):
    families = run(tmp_path)
    assert sum(family["files"] for family in families.values()) >= 10_000 * int(TIMES)
    read = {name for name, family in families.items() if {"0", "1"} & family["codes"].keys()}
    assert read == families.keys(), f"everything refused: {families.keys() - read}"


def test_the_same_files_every_time(tmp_path):
    """The files of a failure are kept and are those that the numbers name: twice drawn, byte for byte the same."""
    from random import Random

    from hostile.families import quick_families

    families = quick_families(tmp_path / "seeds")
    for name in ("safetensors", "config", "gguf"):
        for number in range(20):
            drawn = []
            for copy in ("a", "b"):
                folder = tmp_path / name / str(number) / copy
                folder.mkdir(parents=True)
                families[name].write(Random(f"0 {name} {number}"), folder)
                drawn.append({path.name: path.read_bytes() for path in folder.iterdir()})
            assert drawn[0] == drawn[1]


def allocate(given, target):
    return len(bytearray(700_000_000)) * 0


def endless(given, target):
    while True:
        pass


def crash(given, target):
    os.kill(os.getpid(), signal.SIGKILL)


def leave_partial(given, target):
    (target / "model.partial").write_text("half")
    return 0


def write_beside(given, target):
    (given.parent / "outside").write_text("")
    return 0


def change_input(given, target):
    (given / "file").write_text("other")
    return 0


def leave_on_refusal(given, target):
    (target / "left").write_text("")
    print("error: no", file=sys.stderr)
    return 2


def unpickle(given, target):
    import pickle

    return pickle.loads(b"cposixpath\ndirname\n(S'x'\ntR.") and 0


def two_lines(given, target):
    print("error: a\nb", file=sys.stderr)
    return 2


def escape(given, target):
    print("\x1b[2J")
    return 0


BREACHES = {
    allocate: "MemoryError",
    endless: "hang",
    crash: "SIGKILL",
    leave_partial: "left behind",
    write_beside: "outside of the target",
    change_input: "outside of the target",
    leave_on_refusal: "left behind",
    unpickle: "pickle.find_class",
    two_lines: "2 lines",
    escape: "control characters",
}


def test_the_sandbox_sees_each_breach(tmp_path, monkeypatch):
    monkeypatch.setattr("hostile.sandbox.SECONDS", 0.3)
    monkeypatch.chdir(tmp_path)

    def write(folder):
        (folder / "file").write_text("hostile")

    cases = [Case(number, write, reader) for number, reader in enumerate(BREACHES)]
    outcomes = list(run_all([*cases, Case(99, write, lambda given, target: 0)], tmp_path / "work"))
    assert [outcome.number for outcome in outcomes] == [*range(len(BREACHES)), 99]
    for outcome, (reader, words) in zip(outcomes, BREACHES.items(), strict=False):
        assert outcome.problem and words in outcome.problem, (reader.__name__, outcome)
    assert outcomes[-1].problem is None
