"""Tokenizer, processor and generation files, and the chat template; `against_base.py` compares the former with a base.

Not done: whether a template renders what the model was trained on; without `--base` only defects that show in its text
are found.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from vllm_gemma4q.checkpoint.header import read_json
from vllm_gemma4q.doctor.engines import EXLLAMAV3, Device, Engine
from vllm_gemma4q.doctor.finding import Finding, Severity
from vllm_gemma4q.doctor.subject import Subject
from vllm_gemma4q.errors import InputError

TEMPLATE_FILE, KEY = "chat_template.jinja", "chat_template"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_MAX_TEMPLATE = 1_000_000
_TURN, _GEMMA3_TURN = "<|turn>", "<start_of_turn>"


class _Generation(Extension):
    """`{% generation %} .. {% endgeneration %}`, by which transformers and vLLM mark what the assistant said."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        tag = next(parser.stream)
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=tag.lineno)


def check(subject: Subject, engine: Engine) -> Iterator[Finding]:
    """Files that engines need beside the weights."""
    folder = subject.folder
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        reason = "the engine comes up with a tokenizer that knows no words"
        yield _missing(subject, "missing-tokenizer", _TOKENIZERS[0], reason, Severity.WARNING)
    processors = [name for name in _PROCESSORS if (folder / name).is_file()]
    if "vision_config" in subject.config and not processors and engine.name != EXLLAMAV3:
        on_cpu = engine.device is Device.CPU  # where vLLM tries no picture before it is asked
        reason = "every picture is refused" if on_cpu else "the engine stops: pictures need a processor"
        severity = Severity.WARNING if on_cpu else Severity.ERROR
        yield _missing(subject, "missing-processor", _PROCESSORS[0], reason, severity)
    if not (folder / "generation_config.json").is_file():
        reason = "without its end-of-turn tokens and sampling defaults, those of config.json and the engine hold"
        yield _missing(subject, "missing-generation-config", "generation_config.json", reason, Severity.NOTE)
    yield from _chat_template(subject)


def _missing(subject: Subject, code: str, name: str, reason: str, severity: Severity = Severity.ERROR) -> Finding:
    fix = f"cp {subject.base_path}/{name} {subject.path}/"
    return Finding(code, severity, name, "nothing (missing)", "the file of the model it was made from", reason, fix)


def _chat_template(subject: Subject) -> Iterator[Finding]:
    template = read_template(subject.folder)
    if template is None:
        reason = "the chat endpoints of the engine refuse every request"
        yield _missing(subject, "missing-chat-template", TEMPLATE_FILE, reason, Severity.WARNING)
        return
    fix = f"cp {subject.base_path}/{TEMPLATE_FILE} {subject.path}/"
    original = None if subject.base is None else read_template(subject.base.folder)
    if original is not None and original.strip() != template.strip():
        found, expected = f"another text ({len(template)} characters)", f"BASE's ({len(original)} characters)"
        reason = "prompts are framed otherwise than the model learned"
        yield Finding("stale-chat-template", Severity.WARNING, TEMPLATE_FILE, found, expected, reason, fix)
    if problem := _problem(template):
        found = problem
        reason = "the chat endpoints of the engine refuse every request"
        yield Finding("bad-chat-template", Severity.WARNING, TEMPLATE_FILE, found, "a Jinja template", reason, fix)
        return
    if _GEMMA3_TURN in template or _TURN not in template:
        found = f"Gemma 3's {_GEMMA3_TURN}" if _GEMMA3_TURN in template else f"no {_TURN}"
        reason = "prompts are framed otherwise than the model learned"
        yield Finding("wrong-chat-template", Severity.WARNING, TEMPLATE_FILE, found, _TURN, reason, fix)
    if "tools" not in template:
        reason = "tools of a request never reach the model"
        yield Finding("no-tools-in-template", Severity.NOTE, TEMPLATE_FILE, "no tools", "them", reason, fix)


def _problem(template: str) -> str | None:
    """Why no engine can use a template, None where one can. It is only parsed, never rendered."""
    if len(template) > _MAX_TEMPLATE:
        return f"{len(template):,} characters"
    try:
        Environment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(template)
    except TemplateSyntaxError as error:
        return f"a syntax error in line {error.lineno} ({error.message})"
    except (RecursionError, ValueError) as error:  # brackets without end, a number of 5,000 digits
        return f"what Jinja cannot parse ({'nested too deep' if isinstance(error, RecursionError) else error})"
    return None


def read_template(folder: Path) -> str | None:
    """The chat template that engines take: the file of its own, else that of the tokenizer or processor."""
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
        value = _read(folder / name).get(KEY)
        if isinstance(value, list):  # several, by name
            value = next((item.get("template") for item in value if isinstance(item, dict)), None)
        if isinstance(value, str):
            return value
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except InputError:
        return {}
