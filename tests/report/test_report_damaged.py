"""`gemma4q report` of checkpoints that are damaged, or that somebody made to be: a page or one line, and soon."""

import json
import math
import re
import struct

import pytest
import torch
from gguf import GGUFReader
from report.report_models import SMALL, copy_of, edit, write_gguf

from vllm_gemma4q.architecture import Role, layer_index, layer_of
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.report.facts import collect
from vllm_gemma4q.report.grid import make_cell
from vllm_gemma4q.report.grid_view import GridView
from vllm_gemma4q.report.parts import Column
from vllm_gemma4q.report.render import render
from vllm_gemma4q.report.scales import STEPS, spread_scale

LAYERS = "model.language_model.layers."
DOWN = f"{LAYERS}0.mlp.down_proj"
TOWER = "model.vision_tower.encoder.layers.1.mlp.up_proj"
NAN = float("nan")


@pytest.fixture
def report(gemma4q, tmp_path):
    """Runs the command; its JSON and the page."""

    def run(*arguments):
        page = tmp_path / "page.html"
        code, out, error = gemma4q("report", *arguments, "-o", page, "--json")
        assert code == 0 and not error, error
        return json.loads(out, parse_constant=pytest.fail), page.read_text()

    return run


def cell_of(found, layer, module):
    return next(cell for cell in found["cells"] if (cell["layer"], cell["module"]) == (layer, module))


def one_scale(value):
    def change(tensors):
        tensors[f"{DOWN}.weight_scale"].view(-1)[0] = value
        return tensors

    return change


def nan_code(tensors):
    codes = tensors[f"{DOWN}.weight"].view(torch.uint8)
    codes[0, 0] = 0x7F
    return {**tensors, f"{DOWN}.weight": codes.view(torch.float8_e4m3fn)}


@pytest.mark.parametrize(
    ("scheme", "change"),
    [("int8", one_scale(NAN)), ("int8", one_scale(math.inf)), ("fp8", one_scale(NAN)), ("fp8", nan_code)],
    ids=["int8-nan", "int8-infinite", "fp8-nan", "fp8-code"],
)
def test_errors_that_are_no_numbers(scheme, change, request, tmp_path, report):
    """Shown as such, in the last step, first among the largest."""
    broken = copy_of(request.getfixturevalue(scheme), tmp_path / "broken")
    edit(broken, change)
    found, page = report(broken, "--base", SMALL / "dense")
    assert cell_of(found, 0, "down")["error"] == [None, None, None]
    assert all(map(math.isfinite, cell_of(found, 1, "down")["error"]))
    assert "not finite: a weight or a scale is no number" in page
    first = re.search(r'id="worst".*?<tbody>\s*<tr><td>(.*?)</td>.*?</tr>', page, re.DOTALL)
    assert first[1] == "down of layer 0" and "not finite" in first[0]
    grid = GridView(collect(broken, SMALL / "dense", [], None).grid, True)
    drawn = dict(grid.rows)[Column.DOWN][0]
    assert drawn.error == "∞" and f"e{STEPS - 1}" in drawn.classes.split()


def test_errors_of_a_gguf_that_are_no_numbers(ggufs, tmp_path, report):
    mixed, base = ggufs
    broken = tmp_path / "broken.gguf"
    tensor = next(one for one in GGUFReader(mixed).tensors if one.name == "blk.0.attn_q.weight")
    content = bytearray(mixed.read_bytes())
    content[tensor.data_offset : tensor.data_offset + 2] = struct.pack("<e", NAN)  # a Q8_0 block's scale
    broken.write_bytes(content)
    found, page = report(broken, "--base", base)
    assert cell_of(found, 0, "q")["error"] == [None, None, None] and "not finite" in page


def test_steps_of_errors_that_are_no_numbers():
    scale = spread_scale([1e-4, math.inf, 1e-4], ["a", "not finite", "a"], least_factor=10)
    assert (scale.step(1e-4), scale.step(math.inf)) == (0, STEPS - 1)
    assert scale.used == [0, STEPS - 1] and scale.labels[STEPS - 1] == "not finite"
    assert spread_scale([math.inf], ["not finite"]).step(math.inf) == STEPS - 1


def test_sorted_among_numbers(int8):
    """NaN has no place in an order: the middle of three would be anything."""
    part = collect(int8, None, [], None).grid.cells[0, Column.Q].names[0]
    parts = [one for one in _parts(int8) if one.name == part]
    errors = make_cell("q", parts, {part: [3.0, NAN, 1.0, 2.0, 4.0]}, {}).errors
    assert (errors.least, errors.median, errors.largest) == (1.0, 3.0, math.inf)


def _parts(folder):
    from vllm_gemma4q.doctor.subject import open_subject
    from vllm_gemma4q.report.checkpoint_parts import checkpoint_parts

    return list(checkpoint_parts(open_subject(folder, None)))


def test_names_without_a_root(int8, tmp_path, report):
    """As `save_pretrained` of the base model writes them."""
    broken = copy_of(int8, tmp_path / "broken")
    edit(broken, lambda tensors: {name.removeprefix("model.language_model."): one for name, one in tensors.items()})
    found, _ = report(broken)
    assert not found["cells"] and "other" in found["outside"]


@pytest.mark.parametrize("index", ["99999999999", "999999", "6", "x", "0.self_attn.q_proj.layers.x"])
def test_layers_that_are_none(index, int8, tmp_path, report):
    """Outside: the page has the columns that the configuration has."""
    broken = copy_of(int8, tmp_path / "broken")
    edit(broken, lambda tensors: {**tensors, f"{LAYERS}{index}.self_attn.o_proj.weight": torch.zeros(4, 4)})
    found, page = report(broken)
    assert len(found["layer_types"]) == 6 and {cell["layer"] for cell in found["cells"]} == set(range(6))
    if index.isdigit():
        assert sum(role["count"] for role in found["outside"].values()) > len(found["outside"])
        assert found["outside"]["attention" if len(index) <= 6 else "other"]["count"] >= 1
    if index in ("999999", "6"):
        assert f"got layer {index}, expected 0..5, as config.json says" in page


def test_fewer_layers_than_tensors(int8, tmp_path, report):
    broken = copy_of(int8, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    types = config["text_config"]["layer_types"][:-1]
    config["text_config"] |= {"num_hidden_layers": len(types), "layer_types": types}
    (broken / "config.json").write_text(json.dumps(config))
    found, page = report(broken)
    assert len(found["layer_types"]) == 5 and "Not computed: tensor" in page


def test_layers_by_name():
    assert layer_of(f"{LAYERS}12.mlp.up_proj.weight") == 12 and layer_index("model.layers.3.experts") == 3
    for name in ("layers.0.mlp.up_proj.weight", f"{LAYERS}1234567.mlp.up_proj", TOWER):
        assert layer_of(name) is None
        with pytest.raises(InputError, match="outside of the decoder layers"):
            layer_index(name)


def with_blocks(source, target, count):
    """A GGUF whose header says another number of layers."""
    content = bytearray(source.read_bytes())
    key = b"gemma4.block_count"
    at = content.index(key) + len(key) + 4  # behind the type
    content[at : at + 4] = struct.pack("<I", count)
    target.write_bytes(content)
    return target


def test_blocks_of_a_gguf(ggufs, tmp_path, report, gemma4q):
    """A number that no model has is refused; blocks beyond a smaller one are outside."""
    many = with_blocks(ggufs[0], tmp_path / "a.gguf", 2**32 - 1)
    code, out, error = gemma4q("report", many, "-o", tmp_path / "a.html")
    assert (code, out) == (2, "")
    assert error == "error: a.gguf: gemma4.block_count: got 4294967295, expected at most 1000\n"
    found, _ = report(with_blocks(ggufs[0], tmp_path / "b.gguf", 4))
    assert len(found["layer_types"]) == 4 and {cell["layer"] for cell in found["cells"]} == set(range(4))
    assert found["outside"]["other"]["count"] == 14  # seven linears of two blocks


def test_blocks_without_a_count(tmp_path, report, monkeypatch):
    """By the names of tensors, whatever numbers are in them."""
    from report import report_models

    keys = {key: value for key, value in report_models._gguf_keys().items() if key != "block_count"}
    monkeypatch.setattr(report_models, "_gguf_keys", lambda: keys)
    path = write_gguf(tmp_path / "a.gguf", {})
    content = path.read_bytes().replace(b"blk.5.attn_output.weight", b"blk.99999999999.o.weight")
    path.write_bytes(content.replace(b"blk.5.", b"blk.9."))
    found, _ = report(path)
    assert found["outside"]["other"]["count"] == 1
    assert len(found["layer_types"]) == 10


MANIFESTS = {
    "a-list-of-files": {"source": ["a"]},
    "a-file-that-is-a-text": {"source": {"a": "b"}},
    "bytes-that-are-a-text": {"source": {"a": {"bytes": "many"}}},
    "written-bytes-that-are-a-text": {"output": {"model.safetensors": {"bytes": "many"}}},
    "a-command-that-is-a-number": {"command": 5},
    "versions-that-are-a-list": {"versions": ["1"]},
}


@pytest.mark.parametrize("damage", MANIFESTS.values(), ids=MANIFESTS)
def test_damaged_manifests(damage, int8, tmp_path, gemma4q):
    broken = copy_of(int8, tmp_path / "broken")
    (broken / "gemma4q-manifest.json").write_text(json.dumps({"output": {}, **damage}))
    code, out, error = gemma4q("report", broken, "-o", tmp_path / "page.html")
    assert (code, out) == (2, "") and error.startswith(f"error: gemma4q-manifest.json: {next(iter(damage))}: got ")
    assert error.count("\n") == 1 and not (tmp_path / "page.html").exists()


def test_figures_of_a_manifest_that_are_none(int8, tmp_path, report):
    """Errors below zero, and sizes that are texts, are not shown."""
    broken = copy_of(int8, tmp_path / "broken")
    noted = {f"{LAYERS}0.self_attn.q_proj": {"nmse": -1}, DOWN: {"nmse": 0.5}}
    manifest = {"output": {}, "summary": {"mlp": {"bytes_before": "many"}}, "details": {"linears": noted}}
    (broken / "gemma4q-manifest.json").write_text(json.dumps(manifest))
    found, _ = report(broken)
    assert cell_of(found, 0, "q")["error"] is None and cell_of(found, 0, "down")["error"] == [0.5, 0.5, 0.5]


def test_an_error_of_what_holds_no_weight(int8, tmp_path):
    """A note of a module of which only the scale is left."""
    broken = copy_of(int8, tmp_path / "broken")
    edit(broken, lambda tensors: {name: one for name, one in tensors.items() if name != f"{DOWN}.weight"})
    name = f"{DOWN}.weight_scale"
    manifest = {"output": {}, "details": {"linears": {name: {"nmse": 0.5}}}}
    (broken / "gemma4q-manifest.json").write_text(json.dumps(manifest))
    facts = collect(broken, None, [], None)
    assert facts.grid.cells[0, Column.DOWN].bits is None
    assert "down of layer 0" in render(facts).partition('id="worst"')[2]


def test_result_files_that_lack_figures(int8, tmp_path, gemma4q):
    from vllm_gemma4q.calibration.identity import model_identity
    from vllm_gemma4q.checkpoint import open_checkpoint

    score = {"accuracy": 0.5, "interval": [0.25, 0.75]}
    run = {"model": model_identity(open_checkpoint(int8)), "questions": {"count": 4}}
    path = tmp_path / "gsm8k.json"
    path.write_text(json.dumps({"run": run, "strict": score, "flexible": score}))
    code, _, error = gemma4q("report", int8, "-o", tmp_path / "page.html", "--result", path)
    assert (code, error) == (2, "error: --result: damaged: KeyError: 'truncated'\n")


def test_roles_have_no_columns_outside(int8):
    assert all(part.column is None for part in _parts(int8) if part.role in (Role.VISION, Role.EMBEDDING))
