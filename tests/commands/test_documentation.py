"""README tells the truth: every command is described, every path it names exists, every link resolves."""

import re
from pathlib import Path

import pytest
import typer.main

import gguf_mixed.cli
import vllm_gemma4q.cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()


def commands():
    for name, app in (("gemma4q", vllm_gemma4q.cli.application()), ("gguf-mixed", gguf_mixed.cli.app)):
        for command in typer.main.get_command(app).commands:
            yield f"{name} {command}"


@pytest.mark.parametrize("command", list(commands()))
def test_every_command_is_documented(command):
    assert command in README


def test_every_documented_command_exists():
    known = set(commands())
    for command in re.findall(r"^(?:gemma4q|gguf-mixed) [a-z-]+", README, re.MULTILINE):
        assert command in known


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^(?:make) ([a-z-]+)", README, re.MULTILINE))))
def test_every_documented_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_links_resolve():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README + ARCHITECTURE) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("text", [README, ARCHITECTURE], ids=["README", "ARCHITECTURE"])
def test_file_trees_name_what_exists(text):
    """Blocks marked `tree` list a path in each line's first column."""
    for block in re.findall(r"```tree\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            path = line.split()[0]
            assert (ROOT / path).exists(), path
