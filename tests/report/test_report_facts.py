"""`gemma4q report` without a browser: facts against headers, errors against their definition, escaping, refusals."""

import hashlib
import json
import re
import shutil
from base64 import b64encode
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tolerances
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from report.report_models import (
    GGUF_LINEARS,
    HOSTILE,
    LINEARS,
    SMALL,
    bits_of,
    copy_of,
    edit,
    gguf_bits,
    header,
    write_hostile,
    write_int8,
)
from safetensors.torch import load_file
from vllm_plugin.checkpoints import load

from vllm_gemma4q.calibration.identity import model_identity
from vllm_gemma4q.checkpoint import TensorInfo, open_checkpoint
from vllm_gemma4q.evaluation.gsm8k.answers import Reply
from vllm_gemma4q.evaluation.gsm8k.report import report as gsm8k_report
from vllm_gemma4q.evaluation.gsm8k.results import Results
from vllm_gemma4q.linears import Linear
from vllm_gemma4q.report.facts import MEASURED, NOTED, collect
from vllm_gemma4q.report.measured import _factors
from vllm_gemma4q.report.parts import Column
from vllm_gemma4q.report.render import render
from vllm_gemma4q.report.scales import bits_scale, spread_scale

LAYERS = "model.language_model.layers."


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The definition, in float64."""
    return float((got.double() - expected.double()).square().sum() / expected.double().square().sum())


@pytest.fixture
def report(gemma4q):
    """Runs the command; returns its exit code, stdout and stderr."""
    return partial(gemma4q, "report")


@pytest.mark.parametrize("scheme", ["int8", "fp8", "exl3"])
def test_cells_are_what_headers_say(scheme, request):
    found = request.getfixturevalue(scheme)
    folder = found[0] if scheme == "exl3" else found
    grid = collect(folder, None, [], None).grid
    config = json.loads((folder / "config.json").read_text())
    assert list(grid.layer_types) == config["text_config"]["layer_types"]
    assert grid.columns == (*map(Column, LINEARS), Column.NORMS)
    compared = 0
    for layer in range(len(grid.layer_types)):
        for column, module in LINEARS.items():
            cell, expected = grid.cells.get((layer, Column(column))), bits_of(folder, SMALL / "dense", layer, module)
            assert (cell.bits if cell else None) == expected
            compared += expected is not None
    assert compared > 30


def test_coverage_is_what_headers_say(int8):
    rows = {row.role: row for row in collect(int8, None, [], None).roles}
    sizes = header(int8)
    mlp = {
        name: entry for name, entry in sizes.items() if ".mlp." in name and ".layers." in name and "vision" not in name
    }
    assert rows["mlp"].bytes_after == sum(size for _, _, size in mlp.values())
    codes = sum(shape[0] * shape[1] for dtype, shape, _ in mlp.values() if dtype == "I8")
    assert rows["mlp"].quantized == rows["mlp"].parameters == codes
    assert rows["mlp"].bytes_before == 2 * codes
    assert rows["vision"].quantized == 0
    assert rows["total"].bytes_after == sum(size for _, _, size in sizes.values())
    original = sum(int(np.prod(shape)) for _, shape, _ in header(SMALL / "dense").values())
    assert rows["total"].parameters == original


def test_experts_are_one_cell_a_layer(tmp_path):
    """Least, median and largest error of all experts; bits and bytes of all."""
    folder = write_int8(tmp_path / "int8", "moe")
    facts = collect(folder, SMALL / "moe", [], None)
    stored, base = load(folder), load(SMALL / "moe")
    n_experts = base[f"{LAYERS}1.experts.down_proj"].shape[0]
    cell = facts.grid.cells[1, Column.EXPERTS_OUT]
    errors = []
    for expert in range(n_experts):
        module = f"{LAYERS}1.experts.{expert}.down_proj"
        dense = stored[f"{module}.weight"].double() * stored[f"{module}.weight_scale"].double().view(-1, 1)
        errors.append(relative_error(dense, base[f"{LAYERS}1.experts.down_proj"][expert]))
    assert cell.count == cell.errors.count == n_experts
    got = [cell.errors.least, cell.errors.median, cell.errors.largest]
    np.testing.assert_allclose(got, [min(errors), np.median(errors), max(errors)], rtol=tolerances.REPORTED_ERROR)
    assert facts.grid.cells[1, Column.EXPERTS_IN].count == 2 * n_experts
    assert cell.parameters == base[f"{LAYERS}1.experts.down_proj"].numel()


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_measured_errors_are_the_definition(scheme, request, tmp_path):
    """A scale that is a tenth too large is seen."""
    folder = request.getfixturevalue(scheme)
    stored, base = load_file(folder / "model.safetensors"), load_file(SMALL / "dense" / "model.safetensors")
    module = f"{LAYERS}1.mlp.down_proj"
    scale = stored[f"{module}.weight_scale"].double().reshape(-1, 1)
    expected = relative_error(stored[f"{module}.weight"].double() * scale, base[f"{module}.weight"])
    facts = collect(folder, SMALL / "dense", [], None)
    assert facts.errors == MEASURED
    found = facts.grid.cells[1, Column.DOWN].errors.median
    assert found == pytest.approx(expected, rel=tolerances.REPORTED_ERROR)
    broken = copy_of(folder, tmp_path / "broken")
    edit(broken, lambda tensors: {**tensors, f"{module}.weight_scale": tensors[f"{module}.weight_scale"] * 1.1})
    changed = collect(broken, SMALL / "dense", [], None).grid.cells[1, Column.DOWN].errors.median
    assert changed != pytest.approx(expected, rel=tolerances.REPORTED_ERROR)
    assert changed == pytest.approx(0.01, rel=0.2)


def test_errors_of_trellises_are_the_definition(exl3):
    """All codebooks, bits and kinds of signs, the output layer against the embedding it was made of, and padding."""
    packed, dense = exl3
    meant, base = load_file(dense / "model.safetensors"), load_file(SMALL / "dense" / "model.safetensors")
    facts = collect(packed, SMALL / "dense", [], None)
    for layer in range(len(facts.grid.layer_types)):
        for column, module in LINEARS.items():
            name = f"{LAYERS}{layer}.{module}.weight"
            if name in base:
                expected = relative_error(meant[name], base[name])
                found = facts.grid.cells[layer, Column(column)].errors.median
                assert found == pytest.approx(expected, rel=tolerances.REPORTED_ERROR)
    head = relative_error(meant["lm_head.weight"], base["model.language_model.embed_tokens.weight"])
    outside = {cell.label: cell for cell in facts.grid.outside.values()}
    assert outside["lm head"].errors.median == pytest.approx(head, rel=tolerances.REPORTED_ERROR)


def test_gguf(ggufs):
    mixed, base = ggufs
    facts = collect(mixed, base, [], None)
    bits = gguf_bits(mixed)
    stored = {tensor.name: tensor for tensor in GGUFReader(mixed).tensors}
    original = {tensor.name: tensor for tensor in GGUFReader(base).tensors}
    assert facts.scheme == "GGUF" and facts.errors == MEASURED
    assert [kind == "full_attention" for kind in facts.grid.layer_types] == [False] * 5 + [True]
    for layer in range(6):
        for column, part in GGUF_LINEARS.items():
            name, cell = f"blk.{layer}.{part}.weight", facts.grid.cells[layer, Column(column)]
            assert cell.bits == bits[name]
            values = torch.from_numpy(dequantize(stored[name].data, stored[name].tensor_type))
            expected = relative_error(values, torch.from_numpy(original[name].data.copy()))
            assert cell.errors.median == pytest.approx(expected, rel=tolerances.REPORTED_ERROR)
    assert collect(mixed, None, [], None).errors is None


def test_noted_errors_come_from_the_manifest(int8, tmp_path):
    """Unless its files are not those in the folder."""
    folder = tmp_path / "noted"
    shutil.copytree(int8, folder)
    path = folder / "gemma4q-manifest.json"
    path.chmod(0o644)
    manifest = json.loads(path.read_text())
    note = {"nmse": 0.25, "weight_clipped": 3}
    path.write_text(json.dumps({**manifest, "details": {"linears": {f"{LAYERS}0.self_attn.q_proj": note}}}))
    facts = collect(folder, None, [], None)
    cell = facts.grid.cells[0, Column.Q]
    assert facts.errors == NOTED and cell.errors.median == 0.25 and cell.notes == {"weights clipped": 3}
    assert facts.grid.cells[1, Column.Q].errors is None
    (folder / "model.safetensors").chmod(0o644)
    edit(folder, lambda tensors: {**tensors, f"{LAYERS}0.extra": torch.zeros(3)})
    facts = collect(folder, None, [], None)
    assert facts.errors is None and "manifest is of another checkpoint: model.safetensors has" in facts.no_errors
    assert "manifest is of another checkpoint" in render(facts)


def test_nothing_of_a_checkpoint_becomes_markup(int8, tmp_path):
    text = render(collect(write_hostile(int8, tmp_path), None, [], None))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and HOSTILE not in text
    assert "<img" not in text and "<b>&lt;script" not in text
    assert text.count("<script") == 1


def test_the_page_forbids_the_network_and_allows_its_own_parts_only(int8):
    text = render(collect(int8, None, [], None))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1].replace("&#39;", "'")
    for tag, kind in (("style", "style-src"), ("script", "script-src")):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert not re.search(r"https?://|src=|url\(|@import| style=| on\w+=", text)


def test_json_and_file(int8, report, tmp_path):
    page = tmp_path / "page.html"
    code, out, _ = report(int8, "-o", page, "--json")
    content = json.loads(out)
    assert code == 0 and content["report"] == str(page)
    assert page.read_text().startswith("<!doctype html>")
    cell = next(cell for cell in content["cells"] if (cell["layer"], cell["module"]) == (1, "down"))
    assert cell["bits"] == bits_of(int8, SMALL / "dense", 1, "mlp.down_proj") and cell["dtypes"] == {"I8": 1}
    assert content["verdicts"]["vllm 0.32.0"] == "loads" and content["errors"] is None


def test_refusals(int8, ggufs, report, tmp_path):
    mixed, base = ggufs
    page = tmp_path / "page.html"
    other = tmp_path / "result.json"
    other.write_text(json.dumps({"protocol": {}}))
    cases = [
        ((tmp_path / "nothing",), "not a folder"),
        ((int8, "--base", int8), "got a quantized checkpoint, expected the BF16 one as --base"),
        ((int8, "--base", SMALL / "moe"), "--base: layer 0: got 16 experts, expected none"),
        ((int8, "--engine", "sglang"), "got an unknown engine"),
        ((int8, "--result", other), "result.json: got keys ['protocol'], expected what gemma4q evaluate"),
        ((mixed, "--base", SMALL / "dense"), "expected an unquantized .gguf file"),
        ((base, "--base", mixed), None),
        ((mixed, "--base", mixed), "expected BF16, F16 or F32"),
    ]
    for arguments, text in cases:
        code, out, error = report(*arguments, "-o", page)
        if text is None:
            assert code == 0
            page.unlink()
        else:
            assert code == 2 and not out and text in error and not page.exists()
    code, _, error = report(int8, "-o", tmp_path / "page.txt")
    assert code == 2 and "expected a name that ends in .html" in error


def test_scales():
    scale = bits_scale([8.006, 4.5, 16, 2.06])
    assert [scale.labels[scale.step(value)] for value in (2.06, 3.44, 4.5, 5.5, 6.56, 8.5, 16, 32)] == list(
        scale.labels
    )
    assert scale.used == [0, 2, 5, 6]
    spread = spread_scale([1e-4, 1e-3, 1e-2], ["a", "b", "c"])
    assert spread.step(1e-4) == 0 and spread.step(1e-2) == 7 and 3 <= spread.step(1e-3) <= 4
    close = spread_scale([1.0, 1.2], ["a", "b"], least_factor=10)
    assert close.step(1.2) == 0, "small differences are no alarm"
    assert spread_scale([5.0], ["a"]).labels == ["a"] and spread_scale([], []).used == []


def test_quality_is_what_result_files_say(int8, tmp_path):
    """Figures with their intervals; columns that nothing was measured for are left out."""
    model = model_identity(open_checkpoint(int8))
    protocol = {"texts": [{"name": HOSTILE}], "context": 512, "windows": {"raw": 3},
                "engine": {"name": "vllm", "version": "0.32.0"}}  # fmt: skip
    found = {"model": model, "perplexity": {"raw": {"value": 7.25, "error": 0.125, "positions": 1000}}}
    text = tmp_path / "text.json"
    text.write_text(json.dumps({"protocol": protocol, "checkpoints": {"int8": found}}))
    replies = {index: Reply(f"#### {index}", "stop", 5, None) for index in range(4)}
    run = {"model": model, "questions": {"count": 4, "sha256": "0"}, "prompt": {"sha256": "0", "shots": 8}}
    results = Results(tmp_path / "gsm8k.jsonl", run, replies, {0: "0", 1: "1", 2: "2", 3: "7"})
    score = gsm8k_report(results)
    scores = tmp_path / "gsm8k.json"
    scores.write_text(json.dumps(score))
    page = render(collect(int8, None, [text, scores], None))
    assert "7.2500 ± 0.1250" in page and "windows of 512 tokens, vllm 0.32.0" in page and HOSTILE not in page
    assert "KLD" not in page and "perplexity, original" not in page
    low, high = score["strict"]["interval"]
    assert "75.00%" in page and f"{100 * low:.2f}% to {100 * high:.2f}%" in page
    assert "Quality, measured" not in render(collect(int8, None, [], None))


@pytest.mark.parametrize(
    ("scale", "factors"), [((), (0, 1)), ((1,), (0, 1)), ((256,), (0, 256)), ((256, 1), (0, 256)), ((2, 128), None)]
)
def test_scales_of_blocks_are_told_by_their_shape(scale, factors):
    """128 x 128 blocks of [256, 16384] are as many as there are rows; such as o_proj of global layers of the 31B."""
    weight, stored = (TensorInfo(name, "F8_E4M3", shape, Path("x"), 0, 0)
                      for name, shape in (("o_proj.weight", (256, 16384)), ("o_proj.weight_scale", scale)))  # fmt: skip
    assert _factors(Linear("o_proj", weight, 0, 256), stored) == factors
