"""`gguf-mixed modelfile`: the renderer by size and kind, the context, the stops."""

import pytest
from gguf_files import BF16, gemma4_metadata, moe_26b_a4b, write_gguf, write_split
from test_gguf_cli import gguf_mixed

from gguf_mixed.errors import InputError
from gguf_mixed.ollama import modelfile, renderer
from gguf_mixed.tensors import read_inventory

WEIGHT = ("token_embd.weight", (256, 4), BF16)


def inventory(folder, listed, **metadata):
    values = gemma4_metadata(1, 256, 256) | {f"gemma4.{key}": value for key, value in metadata.items()}
    return read_inventory(write_gguf(folder / "x.gguf", listed, values))


def test_the_whole_file(tmp_path):
    read = inventory(tmp_path, moe_26b_a4b(), context_length=262144)
    assert modelfile(read) == (
        "FROM ./x.gguf\nRENDERER gemma4\nPARSER gemma4\nPARAMETER temperature 0.6\nPARAMETER top_p 0.95\n"
        "PARAMETER repeat_penalty 1.15\nPARAMETER repeat_last_n 256\nPARAMETER num_ctx 256000\n"
        'PARAMETER stop "<turn|>"\nPARAMETER stop "<|tool_response>"\n'
    )
    finished = gguf_mixed("modelfile", tmp_path / "x.gguf")
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, modelfile(read), "")


@pytest.mark.parametrize(
    ("experts", "per_layer", "expected"),
    [(128, 0, "gemma4"), (98, 0, "gemma4"), (48, 0, "gemma4-large"), (48, 256, "gemma4")],
    ids=["26B-A4B", "pruned, above 12B", "pruned, below 12B", "as E4B: small by design"],
)
def test_a_prune_below_12b_is_still_a_large_model(tmp_path, experts, per_layer, expected):
    read = inventory(tmp_path, moe_26b_a4b(experts), embedding_length_per_layer_input=per_layer)
    assert renderer(read) == expected
    assert f"\nRENDERER {expected}\n" in modelfile(read)


def test_the_context_is_no_longer_than_the_models(tmp_path):
    assert "PARAMETER num_ctx 4096\n" in modelfile(inventory(tmp_path, [WEIGHT]))


def test_what_ollama_does_not_read(tmp_path):
    first = write_split(tmp_path, [WEIGHT, ("b.weight", (256, 4), BF16)], 1, gemma4_metadata(1, 256, 256))[0]
    with pytest.raises(InputError, match="split into 2 files, which Ollama does not read"):
        modelfile(read_inventory(first))
    path = tmp_path / "x.gguf"
    inventory(tmp_path, [WEIGHT])
    path.write_bytes(path.read_bytes().replace(b"gemma4", b"gemma3"))
    finished = gguf_mixed("modelfile", path)
    assert finished.returncode == 2
    assert finished.stderr == "error: x.gguf: architecture is gemma3, expected gemma4\n"
