"""Experts removed from GGUF files by their bytes: what stays, what is equal to what, what is refused."""

import numpy as np
import pytest
from ggml_runs import job_for, uneven
from gguf import GGUFReader
from gguf_files import gemma4_metadata, moe_26b_a4b, write_gguf, write_split
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_models import DROPPED, EXPERTS, KEPT, LAYERS, drop_map, expected_data, listed, metadata, model
from quantize_runs import T
from test_recipes import BPW, SUBSTITUTES, imatrix, job

from gguf_mixed.drop_map import retained_of
from gguf_mixed.errors import InputError
from gguf_mixed.ggml_writer import write_model
from gguf_mixed.header import read_header
from gguf_mixed.imatrix import Imatrix, ImatrixEntry
from gguf_mixed.prune import Mixture, Prune
from gguf_mixed.prune_writer import write_pruned
from gguf_mixed.quantize import write_and_verify
from gguf_mixed.tensors import read_inventory

COUNTS = ("gemma4.expert_count", "gemma4.expert_used_count")


def pruned(source, output, dropped=DROPPED, top_k=None):
    """The file at `output`, verified."""
    mixture = Mixture.read(source)
    prune = Prune(mixture, mixture.retained(drop_map(output.parent, dropped, mixture.n_layers), top_k), top_k)
    assert write_and_verify(prune, output, lambda path: write_pruned(prune, path)) == []
    assert output.stat().st_size == prune.file_bytes
    return output


@pytest.mark.parametrize(("split_gate", "alignment"), [(False, None), (True, None), (False, 64)])
def test_what_stays_is_bit_for_bit_what_it_was(tmp_path, split_gate, alignment):
    source = model(tmp_path, split_gate=split_gate, alignment=alignment)
    before, after = GGUFReader(source), GGUFReader(pruned(source, tmp_path / "out.gguf"))
    assert [item.name for item in after.tensors] == [item.name for item in before.tensors]
    assert any(item.data.nbytes % 32 for item in after.tensors)
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert new.tensor_type == old.tensor_type and new.data.tobytes() == expected_data(old), new.name
        assert new.data_offset % (alignment or 32) == 0
    assert list(before.fields) == list(after.fields)
    for key, field in before.fields.items():
        if not key.startswith("GGUF.") and key not in COUNTS[:1]:
            assert [part.tobytes() for part in after.fields[key].parts[1:]] == [
                part.tobytes() for part in field.parts[1:]
            ], key  # strings with a zero byte inside too
    assert [after.fields[key].contents() for key in COUNTS] == [4, 3]


def test_a_file_of_the_pruned_weights_is_the_same_file(tmp_path):
    """Written from arrays by the gguf package, whole file, header included."""
    source = model(tmp_path)
    shapes = [(name, shape, qtype) for name, shape, qtype in listed(experts=4)]
    made = write_gguf(tmp_path / "made.gguf", shapes, metadata(4) | {"gemma4.expert_used_count": 2})
    entries = {entry.name: entry for entry in read_header(made).tensors}
    with made.open("r+b") as file:
        for item in GGUFReader(source).tensors:
            file.seek(entries[item.name].start)
            file.write(expected_data(item))
    assert pruned(source, tmp_path / "out.gguf", top_k=2).read_bytes() == made.read_bytes()


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_uniform_map(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    count = data.draw(st.integers(0, EXPERTS - 1))
    dropped = {layer: data.draw(st.permutations(range(EXPERTS)))[:count] for layer in range(LAYERS)}
    kept = {layer: sorted({*range(EXPERTS)} - {*ids}) for layer, ids in dropped.items()}
    source = model(folder)
    output = pruned(source, folder / "out.gguf", dropped, 1)
    after = {item.name: item.data.tobytes() for item in GGUFReader(output).tensors}
    assert after == {item.name: expected_data(item, kept) for item in GGUFReader(source).tensors}


def test_dropping_nothing_gives_the_same_file(tmp_path):
    source = model(tmp_path)
    assert pruned(source, tmp_path / "out.gguf", {}).read_bytes() == source.read_bytes()


@pytest.mark.parametrize(("qtype", "row"), [(T.Q8_0, 64), (T.Q4_0, 64), (T.F16, 40), (T.Q4_K, 256), (T.IQ3_S, 256)])
def test_quantized_then_pruned_is_pruned_then_quantized(quantizers, tmp_path, qtype, row):
    """Without an imatrix, tensor for tensor, since no block reaches over two experts."""
    source = model(tmp_path, row=row)

    def quantized(path, output):
        write_model(job_for(path, qtype), quantizers, output)
        return output

    first = pruned(quantized(source, tmp_path / "q.gguf"), tmp_path / "q-p.gguf")
    second = quantized(pruned(source, tmp_path / "p.gguf"), tmp_path / "p-q.gguf")
    assert read_inventory(first).tensors["blk.0.ffn_down_exps.weight"].qtype is qtype
    assert first.read_bytes() == second.read_bytes()


def test_with_an_imatrix_too_when_it_is_sliced(quantizers, tmp_path):
    source = model(tmp_path)
    whole = uneven(read_inventory(source))
    mixture = Mixture.read(source)
    prune = Prune(mixture, mixture.retained(drop_map(tmp_path)))

    def quantized(path, imatrix, output):
        job = job_for(path, T.Q4_K)
        write_model(type(job)(job.inventory, job.table, imatrix), quantizers, output)
        return output

    def data(path):
        return {item.name: item.data.tobytes() for item in GGUFReader(path).tensors}

    first = pruned(quantized(source, whole, tmp_path / "q.gguf"), tmp_path / "q-p.gguf")
    small = pruned(source, tmp_path / "p.gguf")
    assert data(quantized(small, prune.imatrix(whole), tmp_path / "p-q.gguf")) == data(first)
    other = Prune(mixture, retained_of({"0": [1, 2], "1": [0, 1]}, EXPERTS, LAYERS, 1))
    assert data(quantized(small, other.imatrix(whole), tmp_path / "other.gguf")) != data(first)


def test_the_imatrix_is_sliced_and_the_rest_of_it_is_not(tmp_path):
    source = model(tmp_path)
    whole = uneven(read_inventory(source))
    router = ImatrixEntry(np.full((1, 256), 2, np.float32), np.array([7]))
    whole = Imatrix({**whole.entries, "blk.0.ffn_gate_inp.weight": router}, whole.datasets, 7, 512)
    mixture = Mixture.read(source)
    sliced = Prune(mixture, mixture.retained(drop_map(tmp_path))).imatrix(whole)
    for name, entry in whole.entries.items():
        if name.endswith("_exps.weight"):
            kept = KEPT[int(name.split(".")[1])]
            assert np.array_equal(sliced.entries[name].sums, entry.sums[kept]), name
            assert sliced.entries[name].counts.tolist() == entry.counts[kept].tolist()
        else:
            assert sliced.entries[name] is entry
    assert (sliced.datasets, sliced.chunk_count, sliced.chunk_size) == (("calibration.txt",), 7, 512)
    assert sliced.matches(read_inventory(pruned(source, tmp_path / "out.gguf"))) == ("token_embd.weight",)
    with pytest.raises(InputError, match=r"tensor blk.1.ffn_gate_up_exps.weight: got 1024 values, expected 1536"):
        Prune(mixture, mixture.retained(drop_map(tmp_path))).imatrix(sliced)


def test_a_split_model_becomes_one_file(tmp_path):
    first, *others = write_split(tmp_path, listed(), 5, metadata())
    assert others
    generator = np.random.default_rng(4)
    before = read_inventory(first)
    for tensor in before.tensors.values():
        with tensor.path.open("r+b") as file:
            file.seek(tensor.start)
            file.write(generator.bytes(tensor.n_bytes))
    output = pruned(first, tmp_path / "out.gguf")
    after = GGUFReader(output)
    assert not [key for key in after.fields if key.startswith("split.")]
    expected = {item.name: expected_data(item) for path in (first, *others) for item in GGUFReader(path).tensors}
    assert {item.name: item.data.tobytes() for item in after.tensors} == expected


@pytest.fixture(scope="module")
def of_26b(tmp_path_factory):
    """Headers of the 26B-A4B: the one pruned to 98 experts, and one that was listed with 98."""
    folder = tmp_path_factory.mktemp("26b")
    for experts in (128, 98):
        path = folder / f"{experts}.gguf"
        write_gguf(path, moe_26b_a4b(experts), gemma4_metadata(30, 2816, 2112, experts))
        start = read_header(path).data_start
        with path.open("r+b") as file:
            file.truncate(start)
    dropped = {layer: [(layer + 4 * step) % 128 for step in range(30)] for layer in range(30)}
    return pruned(folder / "128.gguf", folder / "out.gguf", dropped), folder / "98.gguf"


def test_the_header_of_the_26b_is_that_of_98_experts(of_26b):
    found, expected = of_26b
    assert found.read_bytes() == expected.read_bytes()
    inventory = read_inventory(found)
    assert inventory.header_only and inventory.metadata[COUNTS[0]].value == 98
    assert round(inventory.n_elements / 1e9, 3) == 19.878


@pytest.mark.parametrize(
    ("tier", "top", "middle", "low", "attention"),
    [
        ("cd-q6_k", "Q8_0", "Q6_K", "Q5_K", "Q8_0"),
        ("cd-q5_k_m", "Q6_K", "Q5_K", "Q4_K", "Q6_K"),
        ("cd-q4_k_m", "Q5_K", "Q4_K", "Q3_K", "Q5_K"),
        ("cd-q3_k_l", "Q4_K", "Q3_K", "Q3_K", "Q5_K"),
        ("cd-q2_k", "Q3_K", "Q2_K", "Q2_K", "Q4_K"),
    ],
)
def test_sizes_of_the_tiers_of_98_experts(of_26b, tier, top, middle, low, attention):
    """By the published rule in plain numbers: 1, 7 and 22 layers, and what rows of 704 and 2112 are written as."""
    inventory = read_inventory(of_26b[0])
    planned, _ = job(inventory, tier, imatrix(inventory, lambda tensor: 30 - (tensor.layer or 0)))
    expected = 0.0
    for name, shape, qtype in moe_26b_a4b(98):
        layer = int(name.split(".")[1]) if name.startswith("blk.") else -1
        asked = attention if ".attn_" in name else top if layer == 0 else middle if layer < 8 else low
        asked = "F32" if qtype is T.F32 else "Q8_0" if name == "token_embd.weight" else asked
        expected += np.prod(shape) * BPW[SUBSTITUTES.get(asked, asked) if shape[0] % 256 and len(shape) > 1 else asked]
    print(f"{tier}: {planned.file_bytes / 1e9:.2f} GB, {planned.bpw:.3f} bpw")
    assert planned.tensor_bytes == expected / 8
    assert 0 <= planned.file_bytes - planned.tensor_bytes - len(of_26b[0].read_bytes()) < 32 * 700


REFUSED = [
    ({0: [1], 1: []}, {}, "keeps 5 to 6 experts a layer, expected one number for all: llama.cpp has a single expert_c"),
    ({0: [6], 1: []}, {}, "drop.json: layer 0: got expert 6, expected 0..5"),
    ({0: [1, 2, 3, 4], 1: [1, 2, 3, 4]}, {}, r"layer 0: 2 of 6 experts left, expected at least 3 \(top_k\)"),
    ({0: [1], 1: [1]}, {"top_k": 6}, r"layer 0: 5 of 6 experts left, expected at least 6 \(top_k\)"),
]


@pytest.mark.parametrize(("dropped", "options", "message"), REFUSED)
def test_maps_that_are_refused(tmp_path, dropped, options, message):
    with pytest.raises(InputError, match=message):
        pruned(model(tmp_path), tmp_path / "out.gguf", dropped, **options)
    assert not (tmp_path / "out.gguf").exists()


def test_a_map_for_another_number_of_layers(tmp_path):
    mixture = Mixture.read(model(tmp_path))
    for layers, message in ((3, "layer '2': the model has layers 0..1"), (1, "layer 1: missing")):
        with pytest.raises(InputError, match=message):
            mixture.retained(drop_map(tmp_path, {}, layers))


WITHOUT_DOWN = [item for item in listed() if item[0] != "blk.1.ffn_down_exps.weight"]
MODELS = [
    (listed(), {"gemma4.expert_count": None}, "a dense model: it has no gemma4.expert_count"),
    (listed(), {"gemma4.expert_count": 0}, "a dense model: it has no gemma4.expert_count"),
    (listed(), {"gemma4.expert_count": [6, 6]}, r"got \(6, 6\) \(ARRAY\), expected a positive number"),
    (listed(), {"gemma4.expert_used_count": None}, "gemma4.expert_used_count: got nothing, expected a positive number"),
    (listed(), {"gemma4.block_count": 1}, "tensor blk.1.ffn_gate_up_exps.weight: the model has layers 0..0"),
    (listed(), {"gemma4.expert_count": 7}, r"shape \[256, 8, 6\], expected 7 at its end"),
    (WITHOUT_DOWN, {}, "tensor blk.1.ffn_down_exps.weight: missing, expected experts in every layer"),
    ([*listed(), ("blk.0.ffn_down_exps.bias", (256, 6), T.F32)], {}, "blk.0.ffn_down_exps.bias: not known from gemma4"),
    ([*listed(experts=32), ("blk.0.ffn_up_exps.scale", (32,), T.Q8_0)], {"gemma4.expert_count": 32}, "hold several ex"),
]


@pytest.mark.parametrize(("tensors", "changed", "message"), MODELS)
def test_models_that_are_refused(tmp_path, tensors, changed, message):
    keys = {key: value for key, value in (metadata() | changed).items() if value is not None}
    with pytest.raises(InputError, match=message):
        Mixture.read(write_gguf(tmp_path / "model.gguf", tensors, keys))


def test_another_architecture_is_refused(tmp_path):
    source = model(tmp_path)
    source.write_bytes(source.read_bytes().replace(b"gemma4", b"gemma9"))
    with pytest.raises(InputError, match="model.gguf: architecture gemma9, expected gemma4"):
        Mixture.read(source)


def test_a_model_that_shrinks_while_it_is_read(tmp_path):
    source = model(tmp_path)
    mixture = Mixture.read(source)
    prune = Prune(mixture, mixture.retained(drop_map(tmp_path)))
    with source.open("r+b") as file:
        file.truncate(source.stat().st_size - 4000)
    with pytest.raises(InputError, match="model.gguf: truncated while it was read: tensor token_embd.weight"):
        write_and_verify(prune, tmp_path / "out.gguf", lambda path: write_pruned(prune, path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drop.json", "model.gguf"]


def test_a_model_that_is_gone_before_it_is_copied(tmp_path):
    source = model(tmp_path)
    mixture = Mixture.read(source)
    prune = Prune(mixture, mixture.retained(drop_map(tmp_path)))
    source.unlink()
    with pytest.raises(InputError, match="model.gguf: cannot be read: No such file or directory"):
        write_and_verify(prune, tmp_path / "out.gguf", lambda path: write_pruned(prune, path))
    assert [path.name for path in tmp_path.iterdir()] == ["drop.json"]
