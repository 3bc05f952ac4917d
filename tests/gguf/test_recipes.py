"""The recipes: the published rules on real shapes, their scores on weights and imatrices, the registry."""

import subprocess
from collections import Counter

import numpy as np
import pytest
from gemma4q_kernels.ggml import QUANTIZABLE_TYPES, GGMLQuantizationType, type_name
from gguf_files import REAL_31B, gemma4_metadata, moe_26b_a4b, real_31b, write_gguf
from llama_quantize import imatrix_of, small_model, types_of_dry_run

from gguf_mixed.errors import InputError
from gguf_mixed.imatrix import Imatrix, ImatrixEntry
from gguf_mixed.overrides import override_table
from gguf_mixed.quantize import Job, build_command
from gguf_mixed.recipes import RECIPES, Material, find_recipe
from gguf_mixed.recipes.contribdynamic import TIERS, layer_importance, split_layers
from gguf_mixed.recipes.rank15 import mean_abs
from gguf_mixed.tensors import read_inventory

T = GGMLQuantizationType

# Of the 26B-A4B, whose ffn_down rows are 704 and 2112 long.
SUBSTITUTES = {"IQ3_S": "IQ4_NL", "Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}
BPW = {
    "IQ3_S": 3.4375, "IQ4_NL": 4.5, "Q2_K": 2.625, "Q3_K": 3.4375, "Q4_0": 4.5, "Q4_K": 4.5, "Q5_0": 5.5, "Q5_1": 6,
    "Q5_K": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5, "F32": 32,
}  # fmt: skip


def layered(folder, layers, **options):
    """A model of `layers` layers: attention, three feed-forward matrices, embeddings and an untied output."""
    roles = ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    listed = [(f"blk.{layer}.{role}.weight", (256, 4), T.BF16) for layer in range(layers) for role in roles]
    outer = [(f"{name}.weight", (256, 4), T.BF16) for name in ("token_embd", "per_layer_token_embd", "output")]
    return read_inventory(write_gguf(folder / "layered.gguf", [*outer, *listed], **options))


def imatrix(inventory, energy):
    """An imatrix in which `energy(tensor)` is the mean squared input of a channel."""
    quantizable = [tensor for tensor in inventory.tensors.values() if not tensor.kept_because]
    return Imatrix(
        {
            tensor.name: ImatrixEntry(
                np.full((tensor.n_matrices, tensor.row_length), 8 * energy(tensor), np.float32),
                np.full(tensor.n_matrices, 8),
            )
            for tensor in quantizable
        }
    )


def job(inventory, name, data=None):
    choice = find_recipe(name)(Material(inventory, data))
    return Job(inventory, override_table(inventory, choice.types), data), choice


@pytest.mark.skipif(not REAL_31B.exists(), reason=f"{REAL_31B.name} of the real 31B is not here")
def test_rank15_predicts_the_published_size_of_the_31b(tmp_path):
    inventory = read_inventory(write_gguf(tmp_path / "31b.gguf", real_31b(), gemma4_metadata(60, 5376, 21504)))
    data = imatrix(inventory, lambda tensor: 1 + (tensor.layer or 0) + 0.1 * ("down" in tensor.name))
    planned, choice = job(inventory, "rank15", data)
    assert f"{planned.bpw:.3f}" == "3.935"
    assert 0.985 * 3.98 < planned.bpw < 1.015 * 3.98  # the published figure, from a card that rounds
    assert f"{planned.file_bytes / 2**30:.2f}" == "14.06"
    expected = {"blk.59.ffn_down.weight"} | {f"blk.{n}.ffn_{role}.weight" for n in (52, 59) for role in ("gate", "up")}
    assert expected <= set(choice.details["top"]) and len(choice.details["top"]) == 180 * 15 // 100
    assert Counter(qtype.name for qtype in choice.types.values()) == {"Q5_K": 1, "IQ3_S": 153, "IQ4_NL": 230 + 27}


def test_rank15_by_imatrix_and_by_mean_weight(tmp_path):
    inventory = layered(tmp_path, 7, random_weights=True)  # 21 feed-forward matrices: three are on top
    ranked = {"blk.2.ffn_up.weight", "blk.6.ffn_down.weight", "blk.6.attn_q.weight"}
    data = imatrix(inventory, lambda tensor: 5 if tensor.name in ranked else 1)
    choice = find_recipe("rank15")(Material(inventory, data))
    assert choice.details["top"] == ["blk.2.ffn_up.weight", "blk.6.ffn_down.weight", "blk.0.ffn_gate.weight"]
    assert {choice.types[f"{name}.weight"] for name in ("token_embd", "per_layer_token_embd", "output")} == {T.Q5_K}
    assert {qtype for name, qtype in choice.types.items() if ".attn_" in name} == {T.IQ4_NL}
    low = {name for name, qtype in choice.types.items() if qtype is T.IQ3_S}
    assert low == {name for name in choice.types if ".ffn_" in name} - set(choice.details["top"])

    legacy = find_recipe("rank15-legacy")(Material(inventory))
    assert legacy.details["score"].startswith("legacy: mean absolute weight")
    scores = {name: mean_abs(tensor) for name, tensor in inventory.tensors.items() if ".ffn_" in name}
    assert legacy.details["top"] == sorted(scores, key=scores.get, reverse=True)[:3]


@pytest.mark.parametrize("qtype", [T.F32, T.F16, T.BF16])
def test_mean_absolute_weight(tmp_path, qtype):
    path = write_gguf(tmp_path / "m.gguf", [("first.weight", (64, 3), T.F32), ("a.weight", (64, 2, 3), qtype)])
    tensor = read_inventory(path).tensors["a.weight"]
    values = np.where(np.arange(384) % 2, -0.5, 0.25).astype(np.float32)
    stored = {T.F32: values, T.F16: values.astype(np.float16), T.BF16: (values.view(np.uint32) >> 16).astype("<u2")}
    with path.open("r+b") as file:
        file.seek(tensor.start)
        file.write(stored[qtype].tobytes())
    assert mean_abs(tensor) == 0.375


def test_rank15_says_what_it_lacks(tmp_path):
    inventory = layered(tmp_path, 3)
    with pytest.raises(InputError, match="recipe rank15: needs an importance matrix"):
        find_recipe("rank15")(Material(inventory))
    with pytest.raises(InputError, match="tensor blk.0.ffn_gate.weight: the imatrix has no data for it"):
        find_recipe("rank15")(Material(inventory, Imatrix({})))
    header = tmp_path / "header.gguf"
    header.write_bytes(inventory.path.read_bytes()[: inventory.headers[0].data_start])
    with pytest.raises(InputError, match="header.gguf: holds no weights, and rank15-legacy ranks by them"):
        find_recipe("rank15-legacy")(Material(read_inventory(header)))


@pytest.mark.parametrize(
    ("layers", "split"), [(30, (1, 7)), (60, (2, 14)), (48, (2, 11)), (35, (1, 8)), (2, (1, 0)), (1, (1, 0))]
)
def test_layers_of_a_tier_scale_with_depth(layers, split):
    assert split_layers(layers) == split


def test_a_tier_goes_by_the_energy_of_layers(tmp_path):
    inventory = layered(tmp_path, 30)
    data = imatrix(inventory, lambda tensor: 100 - abs((tensor.layer or 0) - 20.25))
    importance = layer_importance(inventory, data)
    assert importance[20] == 5 * 256 * 99.75
    types = find_recipe("cd-q4_k_m")(Material(inventory, data)).types
    by_layer = {layer: types[f"blk.{layer}.ffn_up.weight"] for layer in range(30)}
    assert [layer for layer, qtype in by_layer.items() if qtype is T.Q5_K] == [20]
    assert [layer for layer, qtype in by_layer.items() if qtype is T.Q4_K] == [17, 18, 19, 21, 22, 23, 24]
    assert sum(qtype is T.Q3_K for qtype in by_layer.values()) == 22
    assert {qtype for name, qtype in types.items() if ".attn_" in name} == {T.Q5_K}
    assert {qtype for name, qtype in types.items() if not name.startswith("blk.")} == {T.Q8_0}


def test_a_tier_needs_data_for_every_layer(tmp_path):
    inventory = layered(tmp_path, 3)
    data = imatrix(inventory, lambda tensor: 1)
    cut = Imatrix({name: entry for name, entry in data.entries.items() if not name.startswith("blk.1.")})
    with pytest.raises(InputError, match="imatrix: no data for layer 1"):
        find_recipe("cd-q6_k")(Material(inventory, cut))


@pytest.mark.parametrize("name", ["rank15", *TIERS, "uniform-q6_k", "uniform-iq3_s"])
def test_every_fallback_of_the_26b_a4b_is_priced(tmp_path, name):
    path = write_gguf(tmp_path / "26b.gguf", moe_26b_a4b(), gemma4_metadata(30, 2816, 2112, 128))
    inventory = read_inventory(path)
    data = imatrix(inventory, lambda tensor: 1 + (tensor.layer or 0))
    planned, choice = job(inventory, name, data)
    down = {f"blk.{n}.ffn_down{kind}.weight" for n in range(30) for kind in ("", "_exps")}
    replaced = {tensor for tensor, qtype in choice.types.items() if planned.written[tensor] != qtype}
    assert replaced == {tensor for tensor in down if choice.types[tensor].name in SUBSTITUTES} != set()
    bits = 0.0
    for tensor in inventory.tensors.values():
        asked = choice.types.get(tensor.name, tensor.qtype).name
        written = SUBSTITUTES.get(asked, asked) if tensor.name in down else asked
        assert planned.written[tensor.name].name == written
        bits += tensor.n_elements * BPW[written]
    assert planned.tensor_bytes == bits / 8


def test_registry():
    assert {"rank15", "rank15-legacy", "cd-q6_k", "cd-q2_k", "stock-q4_k_m", "stock-iq3_m"} <= set(RECIPES)
    assert {f"uniform-{type_name(qtype)}" for qtype in QUANTIZABLE_TYPES} <= set(RECIPES)
    assert find_recipe("CD-Q4_K_M") is RECIPES["cd-q4_k_m"]
    with pytest.raises(InputError, match="recipe rank14: unknown, expected rank15, rank15-legacy, cd-q6_k, "):
        find_recipe("rank14")


def test_stock_mixes_are_those_of_llama_quantize(llama_quantize, tmp_path):
    inventory = read_inventory(small_model(tmp_path))
    types = find_recipe("stock-q4_k_m")(Material(inventory)).types
    assert types["token_embd.weight"] is T.Q6_K and types["blk.0.ffn_up.weight"] is T.Q4_K
    assert types["blk.1.ffn_down.weight"] is T.Q8_0 and types["blk.0.ffn_down.weight"] is T.Q5_0
    assert set(types) == set(imatrix_of(inventory).entries)


def test_a_stock_mix_that_llama_quantize_refuses(llama_quantize, tmp_path):
    path = small_model(tmp_path)
    inventory = read_inventory(path)
    path.write_bytes(b"GGUF")
    with pytest.raises(InputError, match="recipe stock-q6_k: llama-quantize --dry-run tells no types: "):
        find_recipe("stock-q6_k")(Material(inventory))


@pytest.mark.parametrize("name", ["rank15", "cd-q4_k_m"])
@pytest.mark.parametrize("model", ["26B-A4B", "31B"])
def test_llama_quantize_would_write_the_plan_for_real_shapes(llama_quantize, tmp_path, name, model):
    if model == "31B" and not REAL_31B.exists():
        pytest.skip(f"{REAL_31B.name} is not here")
    real = {"26B-A4B": (moe_26b_a4b, (30, 2816, 2112, 128)), "31B": (real_31b, (60, 5376, 21504))}
    listed, shape = real[model]
    inventory = read_inventory(write_gguf(tmp_path / "real.gguf", listed(), gemma4_metadata(*shape)))
    planned, _ = job(inventory, name, imatrix(inventory, lambda tensor: 1 + (tensor.layer or 0)))
    (tmp_path / "table.txt").write_text(planned.table.text)
    command = build_command(llama_quantize, planned, tmp_path / "table.txt", tmp_path / "out.gguf", threads=1)
    finished = subprocess.run([command[0], "--dry-run", *command[1:]], capture_output=True, text=True, check=True)
    log = finished.stdout + finished.stderr
    assert types_of_dry_run(log) == planned.written
    assert f"quant size  = {planned.tensor_bytes / 2**20:8.2f} MiB" in log
    assert "falling back" not in log and not (tmp_path / "out.gguf").exists()
