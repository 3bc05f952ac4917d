"""The EXL3 writer against the kernels it calls, tensor by tensor, and what else a checkpoint of the format holds."""

import json

import pytest
import torch
from exl3_runs import FULL, LAYER, LENGTH, SAMPLES, SLIDING, load, manifest, run, tiny_config, write_hessians
from gemma4q_kernels.exl3 import quantize_linear, reconstruct
from synthetic import add_left_over, shapes, small_config, write_checkpoint
from tolerances import EXL3_REPORTED

from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.exl3.facts import read_facts
from vllm_gemma4q.exl3.hessians import Hessians
from vllm_gemma4q.exl3.quantize import Options, plan
from vllm_gemma4q.exl3.steps import seed_of
from vllm_gemma4q.exl3.storage import disagreements
from vllm_gemma4q.linears import linears_of

MCG = 0xCBAC1FED
GATE_UP, DOWN = f"{LAYER}.experts.gate_up_proj", f"{LAYER}.experts.down_proj"


class Written:
    """One source, its Hessians and what became of it."""

    def __init__(self, folder, config, options):
        self.source = write_checkpoint(folder / "source", config, shards=2)
        self.before, self.target = load(self.source), folder / "target"
        self.hessians = write_hessians(self.source, folder / "statistics")
        self.consumed = []
        self.plan, self.after = run(
            self.source, self.target, options, folder / "statistics", progress=self.consumed.append
        )

    def stored(self, module):
        return {name.rpartition(".")[2]: tensor for name, tensor in self.after.items() if name.startswith(f"{module}.")}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """One global layer, whose keys are its values; tied. 4 bits in all layers, 5 in the head."""
    return Written(tmp_path_factory.mktemp("dense"), tiny_config(FULL), Options(4, 5))


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """One layer of two experts, untied; the head stays as it is."""
    config = tiny_config(SLIDING, moe=True, tie_word_embeddings=False) | {"tie_word_embeddings": False}
    return Written(tmp_path_factory.mktemp("moe"), config, Options(4, 16, "mul1"))


def is_what_the_kernel_makes(stored, weight, hessian, bits, codebook, module):
    expected = quantize_linear(weight, torch.from_numpy(hessian), bits, codebook, seed=seed_of(module)).weight
    return all(torch.equal(stored[name], getattr(expected, name)) for name in ("trellis", "suh", "svh"))


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.down_proj"])
def test_linears_are_what_the_kernel_makes(dense, name):
    module = f"{LAYER}.{name}"
    stored, weight = dense.stored(module), dense.before[f"{module}.weight"]
    assert is_what_the_kernel_makes(stored, weight, dense.hessians[module], 4, "mcg", module)
    assert set(stored) == {"trellis", "suh", "svh", "mcg"}
    assert (stored["mcg"].dtype, stored["mcg"].shape) == (torch.int32, ())
    assert stored["mcg"].item() & 0xFFFFFFFF == MCG


def test_tied_head_is_made_of_the_embedding_that_stays(dense):
    embedding = "model.language_model.embed_tokens.weight"
    stored = dense.stored("lm_head")
    assert is_what_the_kernel_makes(stored, dense.before[embedding], dense.hessians["lm_head"], 5, "mcg", "lm_head")
    assert set(stored) == {"trellis", "suh", "svh", "mcg"}
    assert torch.equal(dense.after[embedding], dense.before[embedding])
    assert json.loads((dense.target / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize(("expert", "part"), [(1, "up_proj"), (1, "down_proj")])
def test_fused_experts_are_stored_one_by_one(moe, expert, part):
    module, fused = f"{LAYER}.experts.{expert}.{part}", DOWN if part == "down_proj" else GATE_UP
    rows = moe.before[fused][expert]
    weight = rows if part == "down_proj" else rows.chunk(2)[1]
    stored = moe.stored(module)
    assert is_what_the_kernel_makes(stored, weight, moe.hessians[fused], 4, "mul1", module)
    assert set(stored) == {"trellis", "suh", "svh", "mul1"}
    assert fused not in moe.after


def test_what_is_not_quantized_is_copied(dense, moe):
    for written in (dense, moe):
        packed = {name.rpartition(".")[0] for name in written.after if name.endswith(".trellis")}
        others = {name for name in written.after if name.rpartition(".")[0] not in packed}
        gone = {name for name in written.before if name not in others}
        assert all(torch.equal(written.after[name], written.before[name]) for name in others)
        assert {name.removesuffix(".weight") for name in gone} - packed <= {GATE_UP, DOWN}
    assert "lm_head.weight" in moe.after
    assert f"{LAYER}.router.proj.weight" in moe.after


def test_every_linear_of_the_layers_is_packed(dense, moe):
    """A global layer has no values; an expert three linears."""
    assert sum(name.endswith(".trellis") for name in dense.after) == 3 + 3 + 1
    assert sum(name.endswith(".trellis") for name in moe.after) == 4 + 3 + 2 * 3


def test_sizes_are_known_before_anything_is_computed(dense, moe):
    for written in (dense, moe):
        files = sorted(written.target.glob("*.safetensors"))
        assert sum(path.stat().st_size for path in files) == written.plan.output_bytes
        assert sum(written.consumed) == written.plan.source_bytes
        assert [path.name for path in files] == [shard.name for shard in written.plan.shards]


def test_a_layer_is_a_shard_of_its_own(dense):
    index = json.loads((dense.target / "model.safetensors.index.json").read_text())["weight_map"]
    layers = {file for name, file in index.items() if ".language_model.layers.0." in name}
    assert len(layers) == 1
    assert {name for name, file in index.items() if file in layers} == {
        name for name in dense.after if ".language_model.layers.0." in name
    }


def test_config(dense, moe):
    expected = {
        "quant_method": "exl3",
        "version": "1.4.1",
        "bits": 4.0,
        "head_bits": 5,
        "calibration": {"rows": SAMPLES, "cols": LENGTH},
        "out_scales": "always",
        "codebook": "mcg",
    }
    config = json.loads((dense.target / "config.json").read_text())
    before = json.loads((dense.source / "config.json").read_text())
    assert config == {**before, "quantization_config": expected}
    found = json.loads((moe.target / "config.json").read_text())["quantization_config"]
    assert (found["bits"], found["head_bits"], found["codebook"]) == (4.0, 16, "mul1")


def test_storage_file_names_every_tensor(dense):
    found = json.loads((dense.target / "quantization_config.json").read_text())
    storage = found.pop("tensor_storage")
    assert found == json.loads((dense.target / "config.json").read_text())["quantization_config"]
    stored = {name: entry for module in storage.values() for name, entry in module["stored_tensors"].items()}
    assert set(stored) == set(dense.after)
    for name, tensor in dense.after.items():
        shape, dtype = list(tensor.shape), str(tensor.dtype)
        assert stored[name] == {"shape": shape, "n_bytes": tensor.nbytes, "dtype": dtype}
    entry = storage["lm_head"]
    assert (entry["quant_format"], entry["bits_per_weight"], entry["mcg_multiplier"]) == ("exl3", 5, MCG)
    assert set(storage["model.language_model.norm"]) == {"stored_tensors"}


def test_our_reader_takes_it(dense, moe):
    for written in (dense, moe):
        headers = open_checkpoint(written.target).tensors
        facts = read_facts(parse_text_architecture(written.plan.config), headers)
        packed = sum(name.endswith(".trellis") for name in written.after)
        assert len(facts.linears) == packed
        storage = json.loads((written.target / "quantization_config.json").read_text())["tensor_storage"]
        assert disagreements(storage, headers) == []


def squared_error(stored, weight):
    dense = reconstruct(stored["trellis"], stored["suh"], stored["svh"], "mcg", dtype=torch.float32).double()
    weight = weight.double()
    difference = dense[: weight.shape[1], : weight.shape[0]].t() - weight
    return float(difference.square().sum() / weight.square().sum())


def test_errors_in_the_manifest(dense):
    details = manifest(dense.target)["details"]
    module = f"{LAYER}.mlp.down_proj"
    stored, weight = dense.stored(module), dense.before[f"{module}.weight"]
    row = details["linears"][module]
    assert (row["bits"], row["seed"]) == (4, seed_of(module))
    assert row["nmse"] == pytest.approx(squared_error(stored, weight), rel=EXL3_REPORTED)
    stored["svh"] = stored["svh"] * 1.1
    assert row["nmse"] != pytest.approx(squared_error(stored, weight), rel=EXL3_REPORTED)
    assert set(details["linears"]) == {name.rpartition(".")[0] for name in dense.after if name.endswith(".trellis")}
    mlp = [f"{LAYER}.mlp.{name}_proj" for name in ("gate", "up", "down")]  # equally large
    for error in ("nmse", "proxy"):
        mean = sum(details["linears"][name][error] for name in mlp) / len(mlp)
        assert details["bits"]["mlp"][error] == pytest.approx(mean)
    assert details["bits"]["lm_head"]["nmse"] == details["linears"]["lm_head"]["nmse"]
    assert details["statistics"]["samples"] == SAMPLES


def test_seeds_are_of_the_name():
    """Another seed for a name would change the bytes of every checkpoint written again."""
    assert seed_of("lm_head") == 3893544002
    names = [name for name, _ in shapes(tiny_config(*[FULL] * 20)).items()]
    assert len({seed_of(name) for name in names}) == len(names)


def test_only_linears_that_the_model_has_are_quantized(tmp_path):
    """And what engines fuse with them, which calibration has not seen: its input is that of its siblings."""
    source = write_checkpoint(tmp_path / "source", small_config())
    modules = add_left_over(source)
    write_hessians(source, tmp_path / "statistics")
    planned = plan(open_checkpoint(source), Options(4, 16), tmp_path / "statistics")
    written = {output.name for step in planned.steps for output in step.written}
    assert f"{modules['shard']}.trellis" in written and f"{modules['shard']}.weight" not in written
    for kind in ("adapter", "layer"):
        assert f"{modules[kind]}.weight" in written and f"{modules[kind]}.trellis" not in written
    tensors = open_checkpoint(source).tensors
    names = (modules["shard"], modules["shard"].replace("v_proj", "q_proj"))
    linears = [linear for name in names for linear in linears_of(tensors[f"{name}.weight"])]
    hessians = [Hessians(tmp_path / "statistics", linears).of(linear) for linear in linears]
    assert len(hessians) == 2 and torch.equal(*hessians)
