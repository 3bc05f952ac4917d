"""What damaged files have found, one plain case each: every one of these ended a command with a traceback or a hang."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gemma4q_kernels.ggml import GGMLQuantizationType
from gemma4q_kernels.int8_scaled_mm import tiles
from hostile import seeds
from hostile.test_hostile_corpus import run
from safetensors.numpy import save_file
from synthetic import small_config, write_checkpoint

from gguf_mixed.error_cache import ErrorCache
from gguf_mixed.fisher import read_fisher
from gguf_mixed.hf_names import n_layers_of
from gguf_mixed.sidecar import read_sidecar
from gguf_mixed.sweep_results import open_results
from gguf_mixed.verify import find_differences
from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.calibration.statistics import FORMAT, read_statistics
from vllm_gemma4q.doctor.subject import open_subject
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.exl3.storage import disagreements
from vllm_gemma4q.restore.formats import listed, parse_format

CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "layer types that are a number": ({"layer_types": 7}, "layer_types is 7, expected a list of names"),
    "more layers than memory": ({"num_hidden_layers": 10**12, "layer_types": None}, "expected at most 1000"),
    "heads that take hours to divide": ({"num_attention_heads": 10**30}, "expected at most 4096"),
    "experts that take hours to name": ({"num_experts": 10**9, "top_k_experts": 1}, "expected at most 1024"),
    "a size of nothing": ({"hidden_size": 0}, "hidden_size is 0, expected a positive integer"),
    "layers that are no objects": (
        {"per_layer_config": {"0": 5}},
        "per_layer_config is .*, expected an object of objects",
    ),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configuration(case):
    changes, message = CONFIGURATIONS[case]
    with pytest.raises(InputError, match=message):
        parse_text_architecture(small_config(**changes))


QUANTIZATIONS: dict[str, tuple[Any, str]] = {
    "a number": (5.5, "quantization_config is 5.5, expected an object"),
    "a list that is a number": ({"quant_method": "fp8", "ignored_layers": 3}, "ignored_layers is 3, expected a list"),
    "a list of numbers": ({"quant_method": "quark", "exclude": [3]}, "exclude is \\[3\\], expected a list of names"),
}


@pytest.mark.parametrize("case", QUANTIZATIONS)
def test_quantization_config(case, tmp_path):
    value, message = QUANTIZATIONS[case]
    folder = write_checkpoint(tmp_path / "a", {**small_config(), "quantization_config": value})
    with pytest.raises(InputError, match=message):
        open_subject(folder, None)


def test_compressed_tensors_whose_groups_are_none():
    for groups in (5, {"a": 5}, {"a": {"input_activations": [1]}}):
        with pytest.raises(InputError, match="expected an object"):
            parse_format({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}})
    config = {"quantization_config": {"quant_method": "quark", "exclude": {"a": 1}}}
    with pytest.raises(InputError, match="exclude is .*, expected a list of names"):
        listed(config, parse_format(config))


def test_exl3_storage_that_is_no_storage():
    for storage in ({"a": {"stored_tensors": 5}}, {"a": {"stored_tensors": []}}, {"a": 3}):
        assert disagreements(storage, {}) == []
    assert disagreements({"a": {"stored_tensors": {"x": 5, "y": {"shape": 7}}}}, {}) == ["x", "y"]


def with_tensor(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    path = folder / "model.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header, data = json.loads(path.read_bytes()[8 : 8 + length]), path.read_bytes()[8 + length :]
    size = int(np.prod(shape))
    header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [len(data), len(data) + size]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data + bytes(size))


TENSORS = {
    "a trellis of one axis": ("model.language_model.layers.0.mlp.up_proj.trellis", (8,)),
    "a layer that is no number": ("model.language_model.layers.x.y", (8,)),
    "a value scale of no layer": ("model.language_model.layers.77.self_attn.v_proj.weight_scale", (1,)),
}


@pytest.mark.parametrize("case", TENSORS)
@pytest.mark.parametrize("quantization", [None, {"quant_method": "fp8", "activation_scheme": "static"}])
def test_doctor_of_strange_tensors(case, quantization, tmp_path, capsys, monkeypatch):
    folder = write_checkpoint(tmp_path / "a", {**small_config(), "quantization_config": quantization})
    with_tensor(folder, *TENSORS[case])
    code, out, err = run("gemma4q", "doctor", folder)
    assert code in (0, 1) and err == "" and "vllm 0.32.0 on GPU: " in out


@pytest.mark.parametrize(
    "template", ["{{" + "(" * 5000, "{{ " + "9" * 5000 + " }}", "{{ x" + "|upper" * 200_000 + " }}"]
)
def test_doctor_of_templates_that_jinja_cannot_parse(template, tmp_path, capsys, monkeypatch):
    folder = write_checkpoint(tmp_path / "a", small_config())
    (folder / "chat_template.jinja").write_text("<|turn>{{ tools }}" + template)
    code, out, _ = run("gemma4q", "doctor", folder)
    assert code == 1 and "bad-chat-template" in out


def test_exl3_of_a_checkpoint_with_unsigned_integers(tmp_path, capsys, monkeypatch):
    folder = write_checkpoint(tmp_path / "a", small_config())
    with_tensor(folder, "extra", (8,))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype": "U8", "shape": [8]', b'"dtype": "U16","shape": [4]'))
    words = ["--scheme", "exl3", "--bits", "3", "--no-hessian", "--dry-run"]
    assert run("gemma4q", "quantize", folder, tmp_path / "made", *words)[0] == 0


def sidecar(change: Callable[[dict[str, Any]], object]) -> bytes:
    content = {"format": 1, "model": {"name": "m", "header_sha256": "0"}, "types": {"a": "q4_k"}, "file_type": 15,
               "table_sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}  # fmt: skip
    change(content)
    return json.dumps(content).encode()


SIDECARS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an unknown type": (lambda c: c["types"].update(a="q99"), "tensor a: 'q99' is not a type of ggml's"),
    "a type that is no text": (lambda c: c["types"].update(a=True), "tensor a: True is not a type of ggml's"),
    "types that are none": (lambda c: c.update(types=1.5), "types is 1.5, expected types by tensor"),
    "no types": (lambda c: c.pop("types"), "types is None, expected types by tensor"),
    "no file type": (lambda c: c.pop("file_type"), "file_type is None, expected a number"),
    "a model that is a list": (lambda c: c.update(model=[]), "model is \\[\\], expected its name"),
}


class NoTable:
    text = ""


@pytest.mark.parametrize("case", SIDECARS)
def test_sidecar(case, tmp_path):
    change, message = SIDECARS[case]
    (tmp_path / "t.txt.json").write_bytes(sidecar(change))
    with pytest.raises(InputError, match=message):
        read_sidecar(tmp_path / "t.txt", NoTable())  # type: ignore[arg-type]


def test_a_planned_type_that_rows_cannot_have(tmp_path):
    model = seeds.gguf_model()
    (tmp_path / "m.gguf").write_bytes(model.to_bytes())
    types = dict.fromkeys((tensor.name for tensor in model.tensors), GGMLQuantizationType.Q4_K)
    with pytest.raises(InputError, match="planned as Q4_K: rows of"):
        find_differences(tmp_path / "m.gguf", types, None)


def test_arrays_of_nothing_that_are_too_large(tmp_path):
    """numpy refuses a shape with 0 whose other sizes overflow; the safetensors library does not."""
    header = json.dumps({"__metadata__": {"format": "gguf-mixed fisher 1", "positions": "1", "details": "{}"},
                         "a.rows": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}}).encode()  # fmt: skip
    path = tmp_path / "f.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="cannot be read as a Fisher file"):
        read_fisher(path)


@pytest.mark.parametrize("key", ["details", "stored_as"])
@pytest.mark.parametrize("value", ["[1]", "NaN", "5", "[" * 20_000])
def test_statistics_whose_metadata_is_none(tmp_path, key, value):
    metadata = {"format": FORMAT, "details": "{}", "stored_as": "{}", key: value}
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "s", metadata)
    with pytest.raises(InputError, match="s: damaged metadata"):
        read_statistics(tmp_path / "s")


def test_an_imatrix_that_would_clear_the_terminal(tmp_path, capsys, monkeypatch):
    (tmp_path / "i").write_bytes(seeds.legacy_imatrix().replace(b"a.txt", b"\x1b[2Ja"))
    code, out, _ = run("gguf-mixed", "imatrix", tmp_path / "i")
    assert code == 0 and "computed on: \\x1b[2Ja" in out


def test_a_layer_of_thousands_of_digits():
    with pytest.raises(InputError, match="expected a number of at most 3 digits"):
        n_layers_of([f"model.layers.{'9' * 5000}.mlp"])


@pytest.mark.parametrize("line", ["[1]", "5", '{"tensor": "a", "digest": "d", "sums": [1]}', "[" * 20_000,
                                  '{"tensor": [], "digest": "d", "sums": {}}'])  # fmt: skip
def test_error_cache(tmp_path, line):
    (tmp_path / "c").write_text('{"gguf-mixed error cache": 1}\n' + line + "\n")
    with pytest.raises(InputError, match="c: damaged"):
        ErrorCache(tmp_path / "c")


@pytest.mark.parametrize("change", [{"inputs": 5}, {"evaluation": "x"}, {"tiers": [{"name": [], "file_bytes": 1}]},
                                    {"tiers": [{"name": "a"}]}, {"tiers": 3}, {"skipped": 5}])  # fmt: skip
def test_sweep_results(tmp_path, change):
    content = {"format": "gguf-mixed sweep 1", "inputs": {}, "evaluation": None, "skipped": {}, "tiers": [], **change}
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="results.json: damaged"):
        open_results(tmp_path, {"model": 1}, {"text": 1})


def test_a_tile_table_whose_key_is_two_lines(tmp_path):
    content = json.loads((tiles.CONFIGS / "sm_90.json").read_text())
    (tmp_path / "sm_90.json").write_text(json.dumps({**content, "line\nbreak" + "x" * 5000: 1}))
    with pytest.raises(ValueError, match=r"line\\nbreakxxx") as refused:
        tiles.load(tmp_path / "sm_90.json")
    assert str(refused.value).isprintable() and len(str(refused.value)) < 700
