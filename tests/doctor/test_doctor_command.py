"""`gemma4q doctor` as users run it: exit codes, JSON, engines, ranks, GGUF files, and 60 GB in seconds."""

import importlib.util
import json
import math
import shutil
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from doctor.broken_checkpoints import SMALL, write_broken
from gguf import GGUFWriter
from peak_memory import measure
from synthetic import CONFIG_26B_A4B, CONFIG_31B, shapes

from vllm_gemma4q.architecture import is_fused_experts, is_linear_weight, parse_text_architecture
from vllm_gemma4q.checkpoint.header import write_header
from vllm_gemma4q.doctor.checks import amx
from vllm_gemma4q.doctor.checks.parallel import largest_of_all
from vllm_gemma4q.doctor.engines import VLLM, VLLM_STOCK, Device, parse_engine
from vllm_gemma4q.doctor.subject import open_subject
from vllm_gemma4q.quark_int8.format import quantization_config

GEMMA4Q, GGUF_MIXED = (Path(sys.executable).with_name(name) for name in ("gemma4q", "gguf-mixed"))
REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "gemma-4-31b" / "hf_text_tensors.json"
SIDECARS = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "generation_config.json",
            "chat_template.jinja")  # fmt: skip
SMALL_MOE = json.loads((SMALL / "moe" / "config.json").read_text())
MB = 1_000_000


@pytest.fixture
def doctor(gemma4q):
    """Runs the command; returns its exit code, stdout and stderr."""
    return partial(gemma4q, "doctor")


def write_int8(folder, config, tensors):
    """Headers of an INT8 checkpoint, experts one by one, and a hole where its weights would be."""
    folder.mkdir()
    stored = []
    for name, shape in tensors:
        for module, part in linears(name, shape):
            stored += [(f"{module}.weight", "I8", part), (f"{module}.weight_scale", "F32", part[:1])]
        if not is_linear_weight(name, shape):
            stored.append((name, "BF16", shape))
    header = write_header(stored)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        length = struct.unpack("<Q", header[:8])[0]
        entries = json.loads(header[8 : 8 + length])
        end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        file.truncate(len(header) + end)
    excluded = [name.removesuffix(".weight") for name, _ in tensors if "vision" in name and name.endswith("weight")]
    quantized = {**config, "dtype": "bfloat16", "quantization_config": quantization_config([*excluded, "lm_head"])}
    (folder / "config.json").write_text(json.dumps(quantized))
    for name in SIDECARS:
        shutil.copy(SMALL / "dense" / name, folder)
    return end


def linears(name, shape):
    if not is_linear_weight(name, shape):
        return
    if not is_fused_experts(name):
        yield name.removesuffix(".weight"), shape
        return
    prefix, _, part = name.rpartition(".")
    for expert in range(shape[0]):
        if part == "down_proj":
            yield f"{prefix}.{expert}.down_proj", shape[1:]
        else:
            for shard in ("gate_proj", "up_proj"):
                yield f"{prefix}.{expert}.{shard}", (shape[1] // 2, shape[2])


@pytest.mark.parametrize("config", [CONFIG_31B, CONFIG_26B_A4B], ids=["31B", "26B-A4B"])
def test_large_int8_checkpoints_in_seconds(config, tmp_path, doctor):
    """Headers of the whole model: of the mixture, 23,000 tensors."""
    n_bytes = write_int8(tmp_path / "int8", config, list(shapes(config).items()))
    assert n_bytes > 25 * 1000 * MB
    check_cost(tmp_path / "int8")
    code, out, _ = doctor(tmp_path / "int8")
    assert code == 0, out


def test_a_bf16_checkpoint_of_60_gb(tmp_path, doctor):
    tensors = [(name, "BF16", shape) for name, shape in shapes(CONFIG_31B).items()]
    header = write_header(tensors)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_31B))
    total = sum(2 * math.prod(shape) for _, _, shape in tensors)
    assert total > 60 * 1000 * MB
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + total)
    for name in SIDECARS:
        shutil.copy(SMALL / "dense" / name, tmp_path)
    check_cost(tmp_path)
    code, out, _ = doctor(tmp_path)
    assert code == 0, out


def check_cost(folder):
    """Seconds and 300 MB, as users run it."""
    cost = measure([GEMMA4Q, "doctor", folder])
    assert cost.cpu_seconds < 5
    assert cost.peak_bytes < 300 * MB


def test_the_real_inventory_is_what_the_doctor_expects():
    """Where the folder is there; the shapes of `synthetic.py` stand in for it elsewhere."""
    expected = dict(parse_text_architecture(CONFIG_31B).shapes())
    if REAL.exists():
        content = json.loads(REAL.read_text())
        real = content if isinstance(content, dict) else {entry["name"]: entry["shape"] for entry in content}
        shared = expected.keys() & real.keys()
        assert len(shared) > 800
        assert all(list(expected[name]) == list(real[name]) for name in shared)
    assert len(expected) > 800


def test_exit_codes(good, tmp_path, doctor):
    assert doctor(good["int8-dense"])[0] == 0
    code, out, _ = doctor(write_broken("int8-no-scale", good, tmp_path))
    assert code == 1 and "fix: gemma4q quantize BASE" in out and "missing-scale" in out
    for folder, text in ((tmp_path / "nothing", "not a folder"), (tmp_path, "config.json: cannot be read")):
        code, out, error = doctor(folder)
        assert code == 2 and not out and text in error


def test_unreadable_folders(tmp_path, doctor):
    shutil.copy(SMALL / "dense" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("")
    code, _, error = doctor(tmp_path)
    assert code == 2 and "only pickle files (pytorch_model.bin), which are never opened" in error
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code, _, error = doctor(tmp_path)
    assert code == 2 and "model_type is 'llama'" in error


def test_json(good, tmp_path, doctor):
    code, out, _ = doctor(good["int8-moe"], "--json", "--base", SMALL / "moe")
    content = json.loads(out)
    assert code == 0
    assert content["scheme"] == "quark-int8" and content["largest_tp"] == 4
    assert content["coverage"]["experts"]["share"] == content["coverage"]["attention"]["share"] == 1
    assert content["coverage"]["router"]["share"] == 0
    plugin, stock = content["engines"]
    assert (plugin["engine"], plugin["version"], plugin["asked"], plugin["verdict"]) == (
        "vllm",
        "0.32.0",
        True,
        "loads",
    )
    assert (stock["engine"], stock["asked"]) == ("vllm-stock", False)
    code, out, _ = doctor(write_broken("int8-tower", good, tmp_path), "--json")
    finding = json.loads(out)["engines"][0]["findings"][0]
    assert code == 1
    assert set(finding) == {"code", "severity", "subject", "found", "expected", "reason", "fix", "count"}
    assert finding["subject"] in (tower := finding["subject"]) and "vision_tower" in tower
    assert finding["count"] > 1 and finding["fix"].startswith("gemma4q restore ")


def test_engines(good, doctor):
    assert doctor(good["exl3-dense"], "--engine", "vllm==0.32.0")[0] == 0
    assert doctor(good["exl3-dense"], "--engine", "exllamav3")[0] == 0
    for engine in ("vllm-stock==0.32.0", "llama.cpp"):
        code, out, _ = doctor(good["exl3-dense"], "--engine", engine)
        assert code == 1 and "would not load" in out
    assert doctor(good["int8-dense"], "--engine", "exllamav3")[0] == 1
    assert doctor(good["int8-dense"], "--engine", "vllm", "--engine", "exllamav3")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--engine", "sglang"), "got an unknown engine"),
        (("--engine", "vllm==0.33.0"), "got version '0.33.0', expected vllm==0.32.0"),
        (("--engine", "exllamav3", "-tp", "2"), "got -tp or -ep, expected neither"),
        (("--overrides", "table.txt"), "expected a .gguf file"),
    ],
)
def test_refusals(arguments, text, good, doctor):
    code, out, error = doctor(good["int8-dense"], *arguments)
    assert code == 2 and not out and text in error


@pytest.mark.parametrize(
    ("config", "ranks", "with_experts"), [(CONFIG_31B, 32, 32), (CONFIG_26B_A4B, 16, 16)], ids=["31B", "26B-A4B"]
)
def test_largest_number_of_ranks(config, ranks, with_experts):
    architecture = parse_text_architecture(config)
    assert largest_of_all(architecture, expert_parallel=False) == ranks
    assert largest_of_all(architecture, expert_parallel=True) == with_experts


def test_ranks(good, doctor):
    """Four heads, two key heads and one: 2 and 4 divide, 3 and 8 do not."""
    assert doctor(good["int8-dense"], "-tp", 2)[0] == doctor(good["int8-dense"], "-tp", 4)[0] == 0
    for ranks in (3, 8):
        code, out, _ = doctor(good["int8-dense"], "-tp", ranks)
        assert code == 1 and f"--tensor-parallel-size {2 if ranks == 3 else 4}" in out
    code, out, _ = doctor(good["bf16-moe"], "-tp", 2, "-ep", "--device", "cpu", "--engine", "vllm-stock")
    assert code == 1 and "segmentation fault" in out
    assert doctor(good["bf16-moe"], "-tp", 2, "-ep", "--device", "cpu")[0] == 0


# gate and up: 2 x 96 and 2 x 2112 rows among the ranks.
@pytest.mark.parametrize(
    ("config", "ranks", "rows", "most"),
    [(SMALL_MOE, 4, 48, 2), (SMALL_MOE, 2, None, None), (CONFIG_26B_A4B, 8, 528, 4), (CONFIG_26B_A4B, 16, None, None),
     (CONFIG_31B, 8, None, None), (CONFIG_31B, 32, None, None)],
    ids=["small, 4", "small, 2", "26B, 8", "26B, 16", "31B, 8", "31B, 32"],
)  # fmt: skip
@pytest.mark.parametrize("has_amx", [True, False], ids=["AMX", "no AMX"])
def test_rows_that_stock_vllm_cannot_pack(config, ranks, rows, most, has_amx, tmp_path, monkeypatch):
    """As an INT8 engine on a CPU with AMX was seen to stop, and only there; the plugin does without that packing."""
    monkeypatch.setattr(amx, "cpu_has_amx", lambda: has_amx)
    write_int8(tmp_path / "int8", config, list(shapes(config).items()))
    subject = open_subject(tmp_path / "int8", None)
    for engine, device in ((VLLM_STOCK, Device.GPU), (VLLM, Device.CPU)):
        assert not list(amx.check(subject, parse_engine(engine, device, ranks)))
    found = list(amx.check(subject, parse_engine(VLLM_STOCK, Device.CPU, ranks)))
    assert len(found) == (rows is not None)
    for finding in found:
        assert finding.subject.endswith("layers.0.mlp.gate_proj.weight")
        assert (finding.found, finding.expected) == (
            f"{rows} rows on each of {ranks} ranks", f"a multiple of 32: at most {most} ranks"
        )  # fmt: skip
        assert finding.severity == ("error" if has_amx else "note")


@pytest.mark.parametrize("key", ["num_experts_per_layer"])
def test_layers_of_their_own_size(key, tmp_path, doctor):
    """Nothing but the configuration is needed to know that stock vLLM stops."""
    text = {**CONFIG_26B_A4B["text_config"], key: [128] * 29 + [98]}
    config = {**CONFIG_26B_A4B, "text_config": text}
    write_int8(tmp_path / "int8", config, list(shapes(config).items()))
    assert doctor(tmp_path / "int8")[0] == 0
    code, out, _ = doctor(tmp_path / "int8", "--engine", "vllm-stock")
    assert code == 1 and "different numbers of experts" in out


def write_gguf(path, template=True):
    writer = GGUFWriter(path, "gemma4")
    writer.add_token_list(["a", "b"])
    if template:
        writer.add_chat_template("<|turn>")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf(tmp_path, doctor):
    whole = write_gguf(tmp_path / "whole.gguf")
    assert doctor(whole)[0] == 0
    code, out, _ = doctor(whole, "--engine", "vllm")
    assert code == 1 and "does not load GGUF" in out
    code, out, _ = doctor(write_gguf(tmp_path / "bare.gguf", template=False))
    assert code == 1 and "missing-chat-template" in out


def gguf_files():
    """`tests/gguf/gguf_files.py`, from a folder whose name is that of the gguf package."""
    path = Path(__file__).resolve().parents[1] / "gguf" / "gguf_files.py"
    spec = importlib.util.spec_from_file_location("gguf_files_of_doctor", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gguf_against_its_plan(tmp_path, doctor):
    """A table beside the file is found; a tensor of another type, and a table that is not the file's, are told."""
    files = gguf_files()
    model = files.write_gguf(tmp_path / "model.gguf", files.small_moe(), files.gemma4_metadata(2, 256, 256, 3))
    table, written = tmp_path / "table.txt", tmp_path / "written.gguf"
    arguments = ["plan", model, "--recipe", "uniform-q8_0", "-o", table]
    subprocess.run([GGUF_MIXED, *map(str, arguments)], check=True, capture_output=True)
    arguments = ["quantize", model, written, "--overrides", table]
    subprocess.run([GGUF_MIXED, *map(str, arguments)], check=True, capture_output=True)
    planned = json.loads(doctor(written, "--json")[1])["engines"][0]["findings"]
    assert "not-as-planned" not in {finding["code"] for finding in planned}
    code, out, _ = doctor(model, "--overrides", table, "--json")
    (finding,) = (one for one in json.loads(out)["engines"][0]["findings"] if one["code"] == "not-as-planned")
    assert code == 1
    assert (finding["found"], finding["expected"]) == ("BF16", "Q8_0")
    assert finding["count"] > 5 and f"--overrides {table}" in finding["fix"]
    (tmp_path / "table.txt.json").unlink()
    code, _, error = doctor(written, "--overrides", table)
    assert code == 2 and "table.txt.json: missing" in error


@pytest.mark.parametrize("name", ["a; touch hacked.bin", "$(touch hacked).pt", "it's.bin", "-rf.bin"])
def test_suggested_commands_quote_names_from_the_checkpoint(name, tmp_path, doctor, monkeypatch):
    """Whoever pastes `rm ..` removes that file and does nothing else."""
    folder = tmp_path / "a b"
    shutil.copytree(SMALL / "dense", folder)
    folder.chmod(0o755)
    (folder / name).write_bytes(b"")
    monkeypatch.chdir(folder)
    before = set(folder.iterdir())
    for path in (folder, "."):
        (folder / name).write_bytes(b"")
        _, out, _ = doctor(path, "--json")
        findings = json.loads(out)["engines"][0]["findings"]
        fix = next(finding["fix"] for finding in findings if finding["code"] == "pickle-file")
        subprocess.run(fix, shell=True, check=True, cwd=folder)
        assert before - set(folder.iterdir()) == {folder / name}
        assert set(folder.iterdir()) < before
