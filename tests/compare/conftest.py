"""Small models of one base in several formats, and the command, run in this process."""

import json

import pytest
from compare_files import CACHE, write_gguf
from synthetic import small_config, write_checkpoint

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.quark_int8 import quantize


@pytest.fixture
def run(gemma4q):
    """`run(command, ...)`: exit code, stdout, stderr."""
    return gemma4q


@pytest.fixture
def compare(run):
    """`compare(...)`: what `gemma4q compare .. --json` prints."""

    def report(*arguments):
        code, out, err = run("compare", *arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return report


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("compare") / "small", small_config(**CACHE))


@pytest.fixture(scope="session")
def int8(base):
    """What `gemma4q quantize --scheme quark-int8` makes of `base`."""
    folder = base.with_name("small-int8")
    convert(quantize.plan(open_checkpoint(base)), folder, ["gemma4q", "quantize"], lambda _: None)
    return folder


@pytest.fixture(scope="session")
def gguf(base):
    return write_gguf(base.with_name("small-Q8_0.gguf"), small_config(**CACHE)["text_config"], "Q8_0")
