"""Base files while they are written, by a llama-perplexity that is a script: no llama.cpp is needed."""

import json

import pytest
from gguf_files import small_moe, write_gguf

from gguf_mixed.atomic_file import WriteError, exclusive
from gguf_mixed.base_file import Comparison, ensure_base, record_path
from gguf_mixed.errors import InputError

CHUNKS, CONTEXT = 4, 64
BASE = "b.kld"


@pytest.fixture
def comparison(tmp_path):
    """Its program writes half of what it should, and fails."""
    tool = tmp_path / "llama-perplexity"
    script = 'while [ "$1" != --kl-divergence-base ]; do shift; done; printf _logits_ > "$2"; echo error: half; exit 1'
    tool.write_text(f'#!/bin/sh\n[ "$1" = --help ] && echo usage && exit\n{script}\n')
    tool.chmod(0o755)
    (tmp_path / "text.txt").write_text("text")
    model = write_gguf(tmp_path / "model.gguf", small_moe())
    return Comparison(tool, model, tmp_path / "text.txt", CHUNKS, CONTEXT)


def test_a_second_run_neither_writes_nor_says_what_the_first_writes(comparison, tmp_path):
    path, first = tmp_path / BASE, json.dumps({**comparison.record, "chunks": 7})
    record_path(path).write_text(first)
    with exclusive(path), pytest.raises(WriteError, match="b.kld: another run is writing here"):
        ensure_base(comparison, path, print)
    assert record_path(path).read_text() == first


def test_half_a_base_is_removed(comparison, tmp_path):
    with pytest.raises(InputError, match="llama-perplexity: exit 1: error: half"):
        ensure_base(comparison, tmp_path / BASE, print)
    assert not list(tmp_path.glob(f"{BASE}*part*")) and not (tmp_path / BASE).exists()
