"""`gguf-mixed plan`, `quantize`, `verify` as a user runs them, mostly with a real llama-quantize."""

import json
import shlex
from itertools import pairwise

import pytest
from gemma4q_kernels.ggml import QUANTIZABLE_TYPES
from gguf import GGUFReader
from llama_quantize import imatrix_of
from quantize_runs import NEW_HELP, OLD_HELP, T, job_of, llama, ok, plan, quantize, with_imatrices

from gguf_mixed.errors import InputError
from gguf_mixed.overrides import override_table
from gguf_mixed.quantize import BASE_TYPES, base_type, file_type_of, override_options
from gguf_mixed.tensors import read_inventory


@pytest.fixture
def folder(tmp_path):
    return with_imatrices(tmp_path)


@pytest.mark.parametrize("recipe", ["rank15", "cd-q4_k_m", "cd-q2_k", "rank15-legacy", "uniform-iq2_xs", "stock-iq3_m"])
@pytest.mark.parametrize("kind", ["gguf", "dat"])
def test_planned_quantized_and_verified(llama_quantize, folder, recipe, kind):
    data = ["--imatrix", folder / f"imatrix.{kind}"]
    tool = ["--llama-cpp", llama_quantize.parent] if recipe.startswith("stock") else []
    planned = json.loads(plan(folder, recipe, *data, *tool, "--json").stdout)
    finished = quantize(folder, *data, "--threads", 1)
    assert finished.returncode == 0, finished.stderr
    assert "all 20 tensors as planned" in finished.stdout
    output = folder / "out.gguf"
    written = GGUFReader(output)
    assert {item.name: item.tensor_type.name.lower() for item in written.tensors} == planned["types"]
    assert output.stat().st_size == planned["predicted"]["file_bytes"]
    assert written.fields["general.file_type"].contents() == planned["file_type"]
    assert ok("verify", output, folder / "table.txt").stdout.endswith("all 20 tensors and the size are as planned\n")
    assert not (folder / "out.gguf.partial").exists()


def test_the_imatrix_is_used(llama_quantize, folder):
    data = ["--imatrix", folder / "imatrix.gguf"]
    plan(folder, "uniform-q4_k")
    assert quantize(folder).returncode == quantize(folder, *data, "--overwrite").returncode == 0
    assert "quantize.imatrix.entries_count" in GGUFReader(folder / "out.gguf").fields
    ok("verify", folder / "out.gguf", folder / "table.txt")  # longer keys, the same plan


def test_an_older_build_gets_one_option_a_tensor(llama_quantize, folder):
    """Real llama-quantize behind a help text without --tensor-type-file, as before #18572; it refuses that option."""
    tool = shlex.quote(str(llama_quantize))
    llama(
        folder,
        f'case "$*" in *--help*) echo "{OLD_HELP}";; *tensor-type-file*) exit 9;; *) exec {tool} "$@";; esac',
    )
    plan(folder, "rank15-legacy")
    command = shlex.split(quantize(folder, "--llama-cpp", folder / "tools", "--dry-run").stdout)
    lines = (folder / "table.txt").read_text().splitlines()
    assert [after for option, after in pairwise(command) if option == "--tensor-type"] == lines
    finished = quantize(folder, "--llama-cpp", folder / "tools")
    assert "all 20 tensors as planned" in finished.stdout


def test_a_build_that_ignores_overrides_is_caught(llama_quantize, folder):
    """As builds before #22572 did for some: everything runs and exits with 0, and the file is another."""
    drop = 'case "$*" in *--help*) echo "%s"; exit;; esac; shift 2; exec %s --allow-requantize "$@"'
    llama(folder, drop % (NEW_HELP, shlex.quote(str(llama_quantize))))
    plan(folder, "uniform-q6_k")
    finished = quantize(folder, "--llama-cpp", folder / "tools")
    assert finished.returncode == 1
    assert "tensor blk.0.ffn_up.weight: got Q5_1, expected Q6_K\n" in finished.stdout
    assert not (folder / "out.gguf").exists() and (folder / "out.gguf.partial").exists()


def test_dry_run_prints_the_command_and_writes_nothing(folder):
    llama(folder, f'echo "{NEW_HELP}"')
    plan(folder, "rank15", "--imatrix", folder / "imatrix.gguf")
    before = sorted(path.name for path in folder.iterdir())
    finished = quantize(folder, "--llama-cpp", folder / "tools", "--imatrix", folder / "imatrix.gguf", "--dry-run")
    assert shlex.split(finished.stdout) == [
        str(folder / "tools" / "llama-quantize"), "--tensor-type-file", str(folder / "table.txt"),
        "--override-kv", "general.file_type=int:25", "--imatrix", str(folder / "imatrix.gguf"),
        str(folder / "model.gguf"), str(folder / "out.gguf.partial"), "Q8_0",
    ]  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_hand_written_table_without_a_sidecar_is_priced_as_it_is_written(llama_quantize, folder):
    inventory = read_inventory(folder / "model.gguf")
    text = override_table(inventory, dict.fromkeys(imatrix_of(inventory).entries, T.Q4_K)).text
    (folder / "table.txt").write_text(text.replace("q5_0", "q4_k"))
    assert "all 20 tensors as planned" in quantize(folder).stdout
    assert read_inventory(folder / "out.gguf").tensors["blk.0.ffn_down.weight"].qtype is T.Q5_0


def test_the_base_type_is_none_of_the_tables():
    assert base_type({"a": T.Q4_K}) is T.Q8_0
    assert base_type({"a": T.Q8_0, "b": T.Q5_1}) is T.Q5_0
    assert base_type(dict(enumerate(BASE_TYPES))) is T.Q8_0


@pytest.mark.parametrize("qtype", QUANTIZABLE_TYPES, ids=lambda qtype: qtype.name)
def test_every_type_has_a_label(folder, qtype):
    types = {"token_embd.weight": qtype, "blk.0.ffn_up.weight": T.Q8_0}
    label = file_type_of(read_inventory(folder / "model.gguf"), types)
    assert label == {"Q4_K": 15, "Q3_K": 12, "IQ3_S": 26, "Q8_0": 7, "F32": 0, "Q2_0": 41}.get(qtype.name, label)
    assert 0 <= label < 64


def test_the_tool_at_hand_is_asked(folder):
    job = job_of(folder)
    assert override_options(llama(folder, f'echo "{OLD_HELP}"'), job.table, folder / "t")[::2] == ["--tensor-type"] * 11
    tool = llama(folder, f'echo "{NEW_HELP}"; exit 1')
    assert override_options(tool, job.table, folder / "t") == ["--tensor-type-file", str(folder / "t")]
    with pytest.raises(InputError, match="does not run"):
        override_options(folder / "none", job.table, folder / "t")
