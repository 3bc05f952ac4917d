"""Chat templates that engines take, and the small files of a checkpoint beside those of its base."""

import json
import shlex
import shutil
import subprocess

import pytest
from doctor.breaks import SMALL, rewritten

from vllm_gemma4q.doctor.checks import against_base
from vllm_gemma4q.doctor.diagnose import diagnose
from vllm_gemma4q.doctor.engines import VLLM, parse_engine
from vllm_gemma4q.doctor.subject import open_subject

LOOP = "{% for message in messages %}{% if message.x %}{% TAG %}{% endif %}{{ message }}{% endfor %}"
ACCEPTED = {
    "generation": "{% generation %}{{ messages }}{% endgeneration %}",
    "trimmed": "{%- generation -%}{{ messages }}{%- endgeneration -%}",
    "nested": "{% for message in messages %}{% generation %}{% if message %}{{ message }}{% endif %}{% endgeneration %}"
    "{% endfor %}",
    "break": LOOP.replace("TAG", "break"),
    "continue": LOOP.replace("TAG", "continue"),
}
REFUSED = {
    "open": "{% generation %}{{ messages }}",
    "closed": "{{ messages }}{% endgeneration %}",
    "crossed": "{% if messages %}{% generation %}{% endif %}{% endgeneration %}",
    "unknown": "{% regeneration %}{% endregeneration %}",
}


@pytest.fixture
def folder(tmp_path):
    """A copy of a checkpoint that may be changed, where a command has to quote its name."""
    target = tmp_path / "it's a copy"
    shutil.copytree(SMALL / "dense", target)
    for path in [target, *target.iterdir()]:
        path.chmod(0o755)
    return target


def codes(folder, base=None):
    found = diagnose(open_subject(folder, base), parse_engine(VLLM)).findings
    return {finding.code: finding for finding in found}


def transformers_takes(template):
    """Whether transformers, which vLLM renders with, compiles a template."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(template)
    except TemplateSyntaxError:
        return False
    return True


@pytest.mark.parametrize("template", [*ACCEPTED.values(), *REFUSED.values()], ids=[*ACCEPTED, *REFUSED])
def test_templates_are_taken_as_transformers_takes_them(template, folder):
    template = "<|turn>{{ tools }}" + template
    (folder / "chat_template.jinja").write_text(template)
    assert transformers_takes(template) == ("bad-chat-template" not in codes(folder))
    assert transformers_takes(template) == any(template.endswith(one) for one in ACCEPTED.values())


def test_the_same_files_and_none(folder):
    assert not codes(folder, SMALL / "dense")
    for name in ("generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert not [code for code in codes(folder, SMALL / "dense") if code.startswith("stale")]


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer_config.json", "generation_config.json",
                                  "tokenizer.json"])  # fmt: skip
def test_another_form_of_the_same_is_no_finding(name, folder):
    """White space, the order of keys, escapes, and what transformers writes of itself."""
    content = json.loads((folder / name).read_text())
    more = {"transformers_version": "4.0", "is_local": True, "local_files_only": False, "chat_template": "{{ x }}"}
    for text in (
        json.dumps(content),
        json.dumps(content, indent=7, sort_keys=True),
        json.dumps(dict(reversed(content.items())), ensure_ascii=True),
        json.dumps(content | more),
    ):
        (folder / name).write_text(text)
        assert not codes(folder, SMALL / "dense")


def test_all_files_of_a_kind_are_one_finding_and_one_command(folder, tmp_path):
    base = tmp_path / "a base; touch hacked"
    shutil.copytree(SMALL / "dense", base)
    for name in ("special_tokens_map.json", "tokenizer.model"):
        (base / name).write_text('{"a": 1}')
        (folder / name).write_text('{"a": 2}')
    rewritten("tokenizer.json", added_tokens=[])(folder)
    rewritten("generation_config.json", do_sample=True)(folder)
    found = codes(folder, base)
    assert set(found) == {"stale-tokenizer", "stale-generation-config"}
    tokenizer = found["stale-tokenizer"]
    assert (tokenizer.severity, tokenizer.subject, tokenizer.count) == ("warning", "tokenizer.json", 3)
    assert shlex.split(tokenizer.fix)[1:-1] == [
        str(base / name) for name in ("tokenizer.json", "tokenizer.model", "special_tokens_map.json")
    ]
    for finding in found.values():
        subprocess.run(finding.fix, shell=True, check=True, cwd=tmp_path)
    assert not codes(folder, base) and not (tmp_path / "hacked").exists()


# A number of more digits than the strict reader takes stands for a tokenizer of more values.
HUGE = "1" * 50


@pytest.mark.parametrize(
    ("text", "is_same"),
    [
        ('{"a b": "x\\" y",\n\t"n": HUGE}', True),
        ('{"a b":"x\\" y","n":HUGE }\n', True),
        ('{"a  b": "x\\" y", "n": HUGE}', False),
        ('{"a b": "x\\"  y", "n": HUGE}', False),
        ('{"a b": "x\\" y", "n": 2HUGE}', False),
        ('{"a b": "x\\" y", "n": HUGE', False),
        ("", False),
    ],
)
def test_what_the_strict_reader_refuses_is_compared_without_white_space(text, is_same, folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(SMALL / "dense", base)
    (base / "added_tokens.json").write_text('{"a b": "x\\" y", "n": HUGE}'.replace("HUGE", HUGE))
    (folder / "added_tokens.json").write_text(text.replace("HUGE", HUGE))
    assert ("stale-tokenizer" not in codes(folder, base)) == is_same


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '"' + '\\"' * 200_000, "\\" * 200_000, "[1]", "\0\0", '{"a":' * 900 + "1" + "}" * 900]
)
def test_what_is_no_json_is_another_file_soon(text, folder):
    """A quote that nobody closes is read once, not once for each quote in it."""
    (folder / "generation_config.json").write_text(text)
    assert "stale-generation-config" in codes(folder, SMALL / "dense")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (b'{"a b" :\t1 ,\n"c":[ ]}\n', b'{"a b":1,"c":[]}'),
        (b'"\\" " \\', b'"\\" "\\'),
        (b'"a \n', b'"a \n'),
        (b"\\\\ 1", b"\\\\1"),
        (b" \n", b""),
    ],
)
def test_white_space_goes_only_where_it_means_nothing(text, kept):
    assert b"".join(match[0] for match in against_base._JSON_PIECE.finditer(text)) == kept
