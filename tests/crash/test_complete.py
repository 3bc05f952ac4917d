"""Every command that writes has a case, with every option that names a file to write."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from crash_cases import CASES, ONLY_KILLED, cases

from gguf_mixed.cli import app
from vllm_gemma4q.cli import application

PRINT = {
    "gemma4q doctor",
    "gemma4q bench",
    "gguf-mixed inspect",
    "gguf-mixed verify",
    "gguf-mixed modelfile",
    "gemma4q tune",  # writes tables, but on a GPU alone; each by `write_file`, as `report` its page
}
READ = {
    "--baseline", "--beside", "--checkpoint", "--drop-map", "--evaluate", "--imatrix", "--llama-cpp", "--overrides",
    "--questions", "--result", "--shots", "--statistics", "--text",
}  # fmt: skip
READ_HERE = {("gemma4q report", "--base")}
PRINTED = {"--log"}  # what an engine prints, as it comes: never the same bytes


def commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {word}")
        else:
            yield f"{name} {word}", command


COMMANDS = {
    **dict(commands(typer.main.get_command(application()), "gemma4q")),
    **dict(commands(typer.main.get_command(app), "gguf-mixed")),
}
ALL_CASES = cases(Path("made"), "url")


def cases_of(command):
    words = command.split()
    return [case for case in ALL_CASES if [case.program, *case.arguments][: len(words)] == words]


def test_every_case_runs():
    assert sorted(case.name for case in ALL_CASES) == sorted([*CASES, *ONLY_KILLED])


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - PRINT))
def test_a_command_that_writes_is_killed_with_all_that_it_writes(command):
    used = {argument for case in cases_of(command) for argument in case.arguments}
    assert used
    options = [option for option in COMMANDS[command].params if option.opts[0].startswith("-")]
    paths = [option for option in options if "Path" in str(option.type_descriptor)]
    written = [option for option in paths if not {*option.opts} & (READ | PRINTED)]
    unused = {option.opts[0] for option in written if not used & {*option.opts}}
    assert {(command, name) for name in unused} <= READ_HERE


def test_the_lists_are_of_this_version():
    assert COMMANDS.keys() > PRINT
    names = {name for command in COMMANDS.values() for option in command.params for name in option.opts}
    assert names >= READ | PRINTED
