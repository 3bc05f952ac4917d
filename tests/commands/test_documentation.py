"""README and docs tell the truth: every command is described, every path they name exists, every link resolves."""

import re
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

import gguf_mixed.cli
import vllm_gemma4q.cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDE = "\n".join(page.read_text() for page in GUIDES)

NO_REPORT = {"gemma4q tune", "gguf-mixed modelfile"}  # what they write is for machines itself


def commands():
    for name, app in (("gemma4q", vllm_gemma4q.cli.application()), ("gguf-mixed", gguf_mixed.cli.app)):
        for command in typer.main.get_command(app).commands:
            yield f"{name} {command}"


@pytest.mark.parametrize("command", list(commands()))
def test_every_command_is_documented(command):
    assert command in GUIDE


@pytest.mark.parametrize("command", list(commands()))
def test_every_command_explains_itself(command):
    name, sub = command.split()
    app = vllm_gemma4q.cli.application((sub,)) if name == "gemma4q" else gguf_mixed.cli.app
    result = CliRunner().invoke(app, [sub, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize("command", [name for name in commands() if name not in NO_REPORT])
def test_every_command_that_reports_does_so_to_machines(command):
    name, sub = command.split()
    app = typer.main.get_command(vllm_gemma4q.cli.application((sub,)) if name == "gemma4q" else gguf_mixed.cli.app)
    found = app.commands[sub]
    for each in getattr(found, "commands", {sub: found}).values():
        assert any("--json" in option.opts for option in each.params), each.name


def test_every_documented_command_exists():
    known = set(commands())
    for command in re.findall(r"^(?:gemma4q|gguf-mixed) [a-z0-9-]+", GUIDE, re.MULTILINE):
        assert command in known


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^(?:make) ([a-z-]+)", README, re.MULTILINE))))
def test_every_documented_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", [*GUIDES, ROOT / "ARCHITECTURE.md"], ids=lambda page: page.name)
def test_links_resolve(page):
    for link, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if "://" in link:
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        if heading:
            anchors = {re.sub(r"[^a-z0-9 -]", "", line.lower()).strip().replace(" ", "-") for line in
                       re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)}  # fmt: skip
            assert heading in anchors


@pytest.mark.parametrize("text", [README, ARCHITECTURE], ids=["README", "ARCHITECTURE"])
def test_file_trees_name_what_exists(text):
    """Blocks marked `tree` list a path in each line's first column."""
    for block in re.findall(r"```tree\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            path = line.split()[0]
            assert (ROOT / path).exists(), path
