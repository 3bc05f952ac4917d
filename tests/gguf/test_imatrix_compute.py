"""llama-imatrix as it is run, on the small trained Gemma 4."""

import numpy as np
import pytest
from small_models import CONTEXT

from gguf_mixed.errors import InputError
from gguf_mixed.imatrix_compute import compute_imatrix
from gguf_mixed.imatrix_gguf import read_imatrix
from gguf_mixed.llama_cpp import find_tool
from gguf_mixed.tensors import read_inventory

EXPERTS, EXPERTS_USED = 16, 4
CHUNKS = 3


@pytest.fixture(scope="module")
def tool(llama_quantize):
    return find_tool("llama-imatrix")


@pytest.fixture
def compute(tool, held_out_text, tmp_path):
    def run(model, **options):
        options = {"chunks": CHUNKS, "context": CONTEXT, "threads": 1, "text": held_out_text} | options
        return compute_imatrix(tool, model, output=tmp_path / "new.gguf", **options)

    return run


def test_dense(compute, small_gguf, tmp_path):
    found = compute(small_gguf("dense"))
    assert found == read_imatrix(tmp_path / "new.gguf")
    assert found.matches(read_inventory(small_gguf("dense"))) == ("token_embd.weight",)
    assert (found.chunk_count, found.chunk_size) == (CHUNKS, CONTEXT)
    assert {int(entry.counts.sum()) for entry in found.entries.values()} == {CHUNKS * CONTEXT}
    assert all((entry.sums > 0).any() for entry in found.entries.values())
    assert [path.name for path in tmp_path.iterdir()] == ["new.gguf"]


def test_tied_embeddings_are_the_output_tensor(compute, small_gguf):
    found = compute(small_gguf("dense"), process_output=True)
    assert found.matches(read_inventory(small_gguf("dense"))) == ()
    assert found.entries["token_embd.weight"].sums.shape == (1, 256)


def test_experts_are_counted_one_by_one(compute, small_gguf):
    found = compute(small_gguf("moe"))
    assert found.matches(read_inventory(small_gguf("moe"))) == ("token_embd.weight",)
    experts = {name: entry for name, entry in found.entries.items() if "_exps" in name}
    assert len(experts) == 2 * 3  # gate_up and down of three layers
    for entry in experts.values():
        assert entry.counts.shape == (EXPERTS,)
        assert entry.counts.sum() == CHUNKS * CONTEXT * EXPERTS_USED
        assert len(np.unique(entry.counts)) > 1


def test_control_tokens_are_read_where_asked(compute, small_gguf, tmp_path):
    text = tmp_path / "chat.txt"
    text.write_text("<|turn>user\nhow are you?<turn|>\n" * 200)
    plain = compute(small_gguf("dense"), text=text)
    special = compute(small_gguf("dense"), text=text, parse_special=True)
    name = "blk.0.attn_q.weight"
    assert not np.allclose(plain.entries[name].sums, special.entries[name].sums, rtol=0.01)


@pytest.mark.parametrize(
    ("characters", "chunks", "reason"),
    [(300, 2, "llama-imatrix: exit 1"), (3000, 500, r"text.txt: too small: \d+ chunks of 128 tokens, asked were 500")],
)
def test_too_small_a_text(compute, small_gguf, held_out_text, tmp_path, characters, chunks, reason):
    text = tmp_path / "text.txt"
    text.write_text(held_out_text.read_text()[:characters])
    with pytest.raises(InputError, match=reason):
        compute(small_gguf("dense"), text=text, chunks=chunks)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_not_told_how_much_takes_what_there_is(compute, small_gguf, held_out_text, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(held_out_text.read_text()[:3000])
    assert 2 <= compute(small_gguf("dense"), text=text, chunks=None).chunk_count < 64


def test_an_interrupted_run_leaves_nothing(compute, small_gguf, tmp_path):
    def interrupt(line):
        if "computing over" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(small_gguf("dense"), chunks=20, log=interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [{"chunks": 0}, {"context": 0}])
def test_nothing_asked(compute, small_gguf, size):
    with pytest.raises(InputError, match="at least one of each"):
        compute(small_gguf("dense"), **size)
