"""What `gguf-mixed plan`, `quantize` and `verify` record, compare and refuse."""

import hashlib
import json
import shutil

import pytest
from gemma4q_kernels.ggml import tensor_bytes
from gguf_files import gemma4_metadata, write_gguf
from llama_quantize import imatrix_of
from quantize_runs import NEW_HELP, T, job_of, llama, plan, quantize, with_imatrices
from test_gguf_cli import gguf_mixed

from gguf_mixed.errors import InputError
from gguf_mixed.imatrix import Imatrix
from gguf_mixed.quantize import Job, check_output
from gguf_mixed.tensors import read_inventory
from gguf_mixed.verify import find_differences


@pytest.fixture
def folder(tmp_path):
    return with_imatrices(tmp_path)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('echo "usage: model type"', "knows neither --tensor-type-file nor --tensor-type: too old"),
        ("echo libllama.so.9: cannot open; exit 127", "--help tells nothing: libllama.so.9: cannot open"),
        (
            f'case "$*" in *--help*) echo "{NEW_HELP}";; *) echo "failed to read x"; echo bye; exit 3;; esac',
            "llama-quantize: exit 3: failed to read x",
        ),
    ],
)
def test_a_llama_quantize_that_does_not_do(folder, script, message):
    llama(folder, script)
    plan(folder, "rank15-legacy")
    finished = quantize(folder, "--llama-cpp", folder / "tools")
    assert finished.returncode == 2
    assert message in finished.stderr.splitlines()[-1]
    assert not (folder / "out.gguf").exists() and not (folder / "out.gguf.partial").exists()


def test_sidecar(folder):
    text = plan(folder, "rank15", "--imatrix", folder / "imatrix.gguf", "--json").stdout
    content = json.loads((folder / "table.txt.json").read_text())
    assert content == json.loads(text)
    inventory = read_inventory(folder / "model.gguf")
    header = (folder / "model.gguf").read_bytes()[: inventory.headers[0].data_start]
    nested = hashlib.sha256(hashlib.sha256(header).digest()).hexdigest()
    assert content["model"] == {
        "name": "model.gguf", "bytes": inventory.file_bytes, "header_sha256": nested, "tensors": 20,
        "parameters": inventory.n_elements,
    }  # fmt: skip
    expected = hashlib.sha256((folder / "imatrix.gguf").read_bytes()).hexdigest()
    assert content["imatrix"] == {"name": "imatrix.gguf", "sha256": expected}
    assert (content["recipe"], content["arguments"]["score"]) == ("rank15", "imatrix: mean squared input")
    assert content["sensitivity"].startswith("none")
    assert {"tensor": "blk.0.ffn_down_exps.weight", "requested": "iq3_s", "written": "iq4_nl"} in content["fallbacks"]
    assert {"python", "gguf", "vllm-gemma4q"} <= set(content["versions"])
    types = {name: T[kind.upper()] for name, kind in content["types"].items()}
    predicted = sum(tensor_bytes(types[name], tensor.shape) for name, tensor in inventory.tensors.items())
    assert content["predicted"]["tensor_bytes"] == predicted
    assert content["predicted"]["bpw"] == 8 * predicted / inventory.n_elements


def test_plan_is_deterministic_and_says_what_is_replaced(folder):
    first = plan(folder, "rank15-legacy").stdout
    content = [(folder / name).read_bytes() for name in ("table.txt", "table.txt.json")]
    assert plan(folder, "rank15-legacy").stdout == first
    assert [(folder / name).read_bytes() for name in ("table.txt", "table.txt.json")] == content
    assert "IQ3_S -> IQ4_NL x 4, IQ4_NL -> F16 x 2" in first


def edited(folder, old, new):
    path = folder / "table.txt"
    path.write_text(path.read_text().replace(old, new))


def test_bad_plans_and_tables_are_one_line(folder):
    plan(folder, "rank15-legacy")
    llama(folder, f'echo "{NEW_HELP}"')
    tools = ["--llama-cpp", folder / "tools", "--dry-run"]

    def refused(finished, message):
        assert finished.returncode == 2 and finished.stdout == ""
        assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1
        assert message in finished.stderr

    model = folder / "model.gguf"
    refused(gguf_mixed("plan", model, "--recipe", "best", "-o", folder / "x"), "recipe best: unknown, expected rank15")
    refused(gguf_mixed("plan", model, "--recipe", "cd-q6_k", "-o", folder / "x"), "cd-q6_k: needs an importance matrix")
    refused(gguf_mixed("plan", model, "--recipe", "uniform-iq2_s", "-o", folder / "x"), "needs imatrix data, and there")
    refused(gguf_mixed("plan", model, "--recipe", "uniform-q4_k", "-o", model), "model.gguf: is the model itself")
    nowhere = folder / "none" / "x"
    refused(gguf_mixed("plan", model, "--recipe", "uniform-q4_k", "-o", nowhere), "cannot be written: No such file")
    other = write_gguf(folder / "other.gguf", [("a.weight", (256, 2), T.BF16)])
    command = ["quantize", other, folder / "o", "--overrides", folder / "table.txt", *tools]
    refused(gguf_mixed(*command), "other.gguf: the table was planned for another model, model.gguf")
    edited(folder, "iq3_s", "iq3_xxs")
    refused(quantize(folder, *tools), "table.txt: changed since it was planned")
    (folder / "table.txt.json").unlink()
    refused(quantize(folder, *tools), "IQ3_XXS needs imatrix data, and there is none for it")
    refused(gguf_mixed("verify", model, folder / "table.txt"), "table.txt.json: missing")
    (folder / "table.txt.json").write_text("{}")
    refused(quantize(folder, *tools), "table.txt.json: not a sidecar of format 1")


def test_what_is_never_overwritten(folder):
    llama(folder, f'echo "{NEW_HELP}"')
    plan(folder, "rank15-legacy")
    tools = ["--llama-cpp", folder / "tools"]
    before = (folder / "model.gguf").read_bytes()
    (folder / "out.gguf").write_text("kept")
    assert "out.gguf: exists: --overwrite" in quantize(folder, *tools).stderr
    command = ["quantize", folder / "model.gguf", folder / "model.gguf", "--overrides", folder / "table.txt", *tools]
    assert "model.gguf: is the model itself" in gguf_mixed(*command, "--overwrite").stderr
    assert (folder / "out.gguf").read_text() == "kept" and (folder / "model.gguf").read_bytes() == before


def test_a_quantized_model_needs_a_word(tmp_path):
    listed = [("token_embd.weight", (256, 4), T.Q8_0)]
    write_gguf(tmp_path / "model.gguf", listed, gemma4_metadata(1, 256, 256))
    llama(tmp_path, f'echo "{NEW_HELP}"')
    plan(tmp_path, "uniform-q4_k")
    tools = ["--llama-cpp", tmp_path / "tools", "--dry-run"]
    assert "already quantized, which costs quality twice: --allow-requantize" in quantize(tmp_path, *tools).stderr
    assert " --allow-requantize " in quantize(tmp_path, *tools, "--allow-requantize").stdout


def test_verify_names_every_difference(folder):
    job = job_of(folder)
    listed = [(name, tensor.shape, job.written[name]) for name, tensor in job.inventory.tensors.items()]
    good = write_gguf(folder / "good.gguf", listed, {"general.file_type": 7})
    assert find_differences(good, job.written, 7) == []
    assert find_differences(good, job.written, 7, good.stat().st_size) == []
    size = good.stat().st_size
    assert find_differences(good, job.written, 8, size + 1) == [
        "general.file_type: got 7, expected 8", f"size: got {size:,} bytes, expected {size + 1:,}",
    ]  # fmt: skip
    changed = [("extra.weight", (32,), T.F32), *listed[2:], (*listed[0][:2], T.Q4_K)]
    bad = write_gguf(folder / "bad.gguf", changed, {"general.file_type": 7})
    assert find_differences(bad, job.written, 7) == [
        "tensor output_norm.weight: not in the file, expected F32",
        "tensor extra.weight: got F32, expected no such tensor",
        "tensor token_embd.weight: got Q4_K, expected Q8_0",
    ]
    with good.open("ab") as file:
        file.write(b"\0" * 32)
    assert find_differences(good, job.written, 7) == [f"size: got {size + 32:,} bytes, expected {size:,}"]
    with good.open("r+b") as file:
        file.truncate(size - 64)
    with pytest.raises(InputError, match="good.gguf"):
        find_differences(good, job.written, 7)


def test_a_full_disk_is_refused_before_work(folder, monkeypatch):
    llama(folder, f'echo "{NEW_HELP}"')
    job = job_of(folder)
    free = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=job.file_bytes - 1))
    with pytest.raises(InputError, match=f"out.gguf: takes {job.file_bytes:,} bytes, and {job.file_bytes - 1:,} are"):
        check_output(job, folder / "out.gguf", overwrite=False)


def test_an_imatrix_of_another_model_is_refused(folder):
    job = job_of(folder)
    entries = {"blk.9.ffn_up.weight": next(iter(imatrix_of(job.inventory).entries.values()))}
    with pytest.raises(InputError, match="imatrix is of another model"):
        Job(job.inventory, job.table, Imatrix(entries))


def test_a_table_goes_with_the_imatrix_it_was_planned_with(folder):
    llama(folder, f'echo "{NEW_HELP}"')
    tools = ["--llama-cpp", folder / "tools", "--dry-run"]
    given, other = (["--imatrix", folder / name] for name in ("imatrix.gguf", "imatrix.dat"))
    plan(folder, "rank15", *given)
    ours, theirs = (hashlib.sha256((folder / f"imatrix.{end}").read_bytes()).hexdigest()[:8] for end in ("gguf", "dat"))
    planned = f"error: table.txt: planned with imatrix imatrix.gguf ({ours}), got"
    for arguments, got in (((), "none"), (other, f"imatrix.dat ({theirs})")):
        finished = quantize(folder, *tools, *arguments)
        assert (finished.returncode, finished.stdout, finished.stderr) == (2, "", f"{planned} {got}\n")
    renamed = shutil.copy(folder / "imatrix.gguf", folder / "renamed.gguf")
    for arguments in (given, ["--imatrix", renamed]):  # by content, not by name
        assert quantize(folder, *tools, *arguments).returncode == 0
    plan(folder, "uniform-q4_k")
    for arguments in ((), given, other):
        assert quantize(folder, *tools, *arguments).returncode == 0
    sidecar = folder / "table.txt.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"imatrix": {"name": 1}}))
    finished = quantize(folder, *tools)
    assert finished.stderr == "error: table.txt.json: imatrix is {'name': 1}, expected its name and sha256\n"
