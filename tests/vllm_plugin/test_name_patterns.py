"""Patterns in lists of modules: those that tools write are read, those that never end are not."""

import re
import time

import pytest

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.fp8_static.ignore import IgnoreList
from vllm_gemma4q.name_patterns import compile_pattern, names_of
from vllm_gemma4q.quark_int8.scheme import is_excluded, is_w8a8_int8

NAME = "model.language_model.layers.17.self_attn.q_proj"
# As llm-compressor, Quark and ModelOpt write them.
WRITTEN = ("re:.*lm_head", "re:.*self_attn.*", r"re:model\.language_model\.layers\.\d+\.self_attn\.[qk]_proj$",
           "re:.*(mlp|attn).*",
           "re:.*vision_tower.*", r"re:.*layers\.(0|1|17)\..*", "re:visual.*", r"re:.*\.q_proj$", "re:.{3}el",
           r"re:.*mlp\.gate$")  # fmt: skip
ENDLESS = {
    "re:(a+)+$": "a repetition of a repetition",
    "re:([a-z_]*)*x": "a repetition of a repetition",
    "re:(?:a|aa|.)+$": "a repetition of alternatives",
    "re:.*.*.*.*.*x": "more than 4 repetitions",
    r"re:(.+)\1+$": "a back reference",
    "re:((a{1,99}){1,99}){1,99}": "a repetition of a repetition",
    "re:(": "missing \\), unterminated subpattern",
    "re:" + "a" * 5000: "5000 characters, expected at most 1000",
    "re:" + "(" * 900 + ")" * 900: "",
}


@pytest.mark.parametrize("entry", WRITTEN)
def test_patterns_that_tools_write(entry):
    assert bool(compile_pattern(entry).match(NAME)) == bool(re.match(entry[3:], NAME))


@pytest.mark.parametrize("entry", ENDLESS, ids=lambda entry: entry[:30])
def test_patterns_without_an_end(entry):
    if entry.count("(") < 100:
        with pytest.raises(InputError, match=ENDLESS[entry]):
            compile_pattern(entry)
        for read in (lambda: IgnoreList([entry]), lambda: is_excluded([NAME], [entry])):
            with pytest.raises(InputError):
                read()


def test_the_worst_that_is_allowed_ends():
    started = time.process_time()
    for pattern in ("re:.*a.*a.*a.*[0-9]$", "re:.*.*.*.*!", "re:(.{16}.{0,16}){1,1}!"):
        assert compile_pattern(pattern).match("a" * 100) is None
    assert time.process_time() - started < 4


@pytest.mark.parametrize("value", ["lm_head", 5, {"lm_head": True}, [None], ["a", 1]])
def test_lists_that_are_none(value):
    with pytest.raises(InputError, match="quantization_config: ignore is .*, expected a list of names"):
        names_of("ignore", value)
    assert not is_w8a8_int8({"quant_method": "quark", "exclude": value})
