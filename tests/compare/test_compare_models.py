"""What is said of models before anything is measured: sizes, bits, memory, one base or not, their origins."""

import json
import math
import shutil

import pytest
from compare_files import CACHE, write_gguf
from safetensors import safe_open
from synthetic import CONFIG_31B, shapes, small_config, write_checkpoint, write_header_only

from gguf_mixed.drop_map import RetainedExperts
from gguf_mixed.sidecar import header_sha256
from gguf_mixed.tensors import read_inventory
from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.compare.model import open_model
from vllm_gemma4q.pruned_moe import prune
from vllm_gemma4q.quark_int8 import quantize


def stored_text_bytes(folder):
    """By the safetensors library, of everything but the vision tower."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if "language_model" in name}  # noqa: SIM118
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_bits_are_all_bytes_of_the_text_model_over_all_its_parameters(compare, base, int8, gguf):
    original, quantized, file = compare(base, int8, gguf)["models"]
    parameters = sum(math.prod(shape) for name, shape in shapes(small_config()).items() if "language_model" in name)
    assert original["parameters"] == quantized["parameters"] == parameters
    assert original["bits_a_weight"] == 16
    assert quantized["bits_a_weight"] == 8 * stored_text_bytes(int8) / parameters
    assert 8 < quantized["bits_a_weight"] < 16
    assert file["bits_a_weight"] == 8.5  # Q8_0: 34 bytes for 32 weights; rotations are neither
    assert quantized["disk_bytes"] == (int8 / "model.safetensors").stat().st_size
    assert file["disk_bytes"] == gguf.stat().st_size
    assert [each["scheme"] for each in (original, quantized, file)] == ["unquantized", "quark-int8", "GGUF"]


def test_memory_is_what_vram_says(compare, run, base, int8, gguf):
    for context in ("4K", "512"):
        for path, each in zip(
            (base, int8, gguf), compare(base, int8, gguf, "--context", context)["models"], strict=True
        ):
            rows = json.loads(run("vram", path, "--context", context, "--json")[1])["rows"]
            assert [row["engine"] for row in rows] == [memory["engine"] for memory in each["memory"]]
            for row, memory in zip(rows, each["memory"], strict=True):
                assert memory["total_bytes"] == sum(row["weights_bytes"].values()) + memory["kv_cache_bytes"]
                assert memory["kv_cache_bytes"] == row["contexts"][0]["kv_cache_bytes"]


def test_nothing_measured_is_said_in_every_cell(run, compare, base, int8):
    code, out, _ = run("compare", base, int8)
    assert code == 0
    [row] = [line for line in out.splitlines() if "small-int8" in line]
    assert row.count("not measured") == 5
    assert "vllm 0.32.0" in row
    assert compare(base, int8)["text"] == compare(base, int8)["gsm8k"] == []


def test_pruned_models_are_of_the_base_and_counted_by_what_is_left(compare, tmp_path):
    source = write_checkpoint(tmp_path / "moe", small_config(moe=True, **CACHE))
    kept = RetainedExperts(4, ((0, 1, 3), (0, 2, 3), (1, 2, 3)))
    pruned = tmp_path / "moe-3"
    convert(prune.plan(open_checkpoint(source), kept), pruned, ["gemma4q", "prune"], lambda _: None)
    int8 = tmp_path / "moe-3-int8"
    convert(quantize.plan(open_checkpoint(pruned)), int8, ["gemma4q", "quantize"], lambda _: None)
    found = compare(source, pruned, int8)
    assert [model["experts"] for model in found["models"]] == [[4] * 3, [3] * 3, [3] * 3]
    assert found["models"][1]["parameters"] == found["models"][2]["parameters"] < found["models"][0]["parameters"]
    assert found["models"][1]["bits_a_weight"] == 16
    assert found["origins"] == []  # the chain leads to the original


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 128}, "hidden_size: got 128, expected 64"),
        ({"vocab_size": 512}, "vocabulary: got 512, expected 256"),
        ({"global_head_dim": 64}, "head_dim of layer 2: got 64, expected 32"),
        ({"num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2}, "number of layers: got 2, expected 3"),
    ],
)
def test_another_architecture_is_refused(run, base, tmp_path, change, said):
    config = small_config(**CACHE, **change)
    for other in (write_checkpoint(tmp_path / "other", config), write_gguf(tmp_path / "a.gguf", config["text_config"])):
        code, out, err = run("compare", base, other)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err == f"error: {other}: {said} as in {base}: not one base\n"


def test_the_same_model_twice_is_refused(run, base, tmp_path):
    shutil.copytree(base, tmp_path / "copy")
    code, _, err = run("compare", base, tmp_path / "copy")
    assert (code, err) == (2, f"error: {tmp_path / 'copy'}: got the same model as {base}, expected another\n")


def test_a_gguf_without_a_size_is_refused(run, base, tmp_path):
    text = small_config(**CACHE)["text_config"]
    path = write_gguf(tmp_path / "bad.gguf", {**text, "num_hidden_layers": 4, "layer_types": text["layer_types"]})
    code, _, err = run("compare", base, path)
    assert code == 2 and "gemma4.attention.head_count_kv: got (2, 2, 1), expected 4" in err


def test_a_gguf_of_too_many_layers_is_refused(run, base, tmp_path):
    path = write_gguf(tmp_path / "bad.gguf", small_config(**CACHE)["text_config"], block_count=4_000_000_000)
    code, _, err = run("compare", base, path)
    assert code == 2 and "block_count: got 4000000000, expected" in err


def test_another_source_is_said(run, base, int8, tmp_path):
    """The same shapes, other weights: a fine-tune's INT8 is not the original's."""
    tuned = write_checkpoint(tmp_path / "tuned", small_config(**CACHE, attention_bias=False), seed=1)
    other = tmp_path / "tuned-int8"
    convert(quantize.plan(open_checkpoint(tuned)), other, ["gemma4q", "quantize"], lambda _: None)
    digest = json.loads((other / "gemma4q-manifest.json").read_text())["source"]["config.json"]["sha256"][:8]
    lines = run("compare", base, int8, other)[1].splitlines()
    assert lines[-2:] == [
        "small-int8 was made from small",
        f"tuned-int8 was made from files that are none of these, config.json {digest}",
    ]
    assert "was made from" not in run("compare", base, int8)[1]


def test_two_folders_of_one_name_are_told_apart(compare, base, int8, tmp_path):
    shutil.copytree(int8, tmp_path / "small")
    assert [model["name"] for model in compare(base, tmp_path / "small")["models"]] == [
        f"{base.parent.name}/small",
        f"{tmp_path.name}/small",
    ]


def test_folders_of_the_real_sizes_are_read_by_their_headers(compare, tmp_path):
    text = {**CONFIG_31B["text_config"], "sliding_window": 1024, "max_position_embeddings": 262144}
    config = {**CONFIG_31B, "text_config": text}
    folder = write_header_only(tmp_path / "31B", config, shapes(config).items())
    [model] = compare(folder)["models"]
    assert model["bits_a_weight"] == 16
    assert model["parameters"] == parse_text_architecture(config).parameters() > 30e9
    assert model["disk_bytes"] > 60e9
    assert 58 < model["memory"][0]["total_bytes"] / 2**30 < 70
    assert open_model(folder).outline.caching_layers == 60


def test_a_sidecar_beside_a_gguf_names_its_source(run, tmp_path):
    """As `gguf-mixed sweep --keep` leaves them."""
    text = small_config(**CACHE)["text_config"]
    source, small = (write_gguf(tmp_path / f"{kind}.gguf", text, kind) for kind in ("F16", "Q4_0"))
    model = {"bytes": source.stat().st_size, "header_sha256": header_sha256(read_inventory(source))}
    sidecar = tmp_path / "Q4_0.txt.json"
    sidecar.write_text(json.dumps({"model": model}))
    assert "was made from" not in run("compare", source, small)[1]
    sidecar.write_text(json.dumps({"model": {**model, "header_sha256": "c" * 64}}))
    last = run("compare", source, small)[1].splitlines()[-1]
    assert last == "Q4_0.gguf was made from files that are none of these, header cccccccc"
    sidecar.write_text("{}")
    assert run("compare", source, small)[2] == f"error: {sidecar}: damaged: KeyError: 'model'\n"


def test_a_damaged_manifest_is_refused(run, int8, tmp_path):
    shutil.copytree(int8, tmp_path / "copy")
    manifest = tmp_path / "copy" / "gemma4q-manifest.json"
    manifest.write_text('{"identity": "x"}')
    code, _, err = run("compare", tmp_path / "copy")
    assert code == 2 and err.startswith(f"error: {manifest}: damaged: AttributeError") and err.count("\n") == 1
