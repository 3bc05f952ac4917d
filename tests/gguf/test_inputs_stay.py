"""No command of `gguf-mixed` writes its result over what it reads, or starts on what it cannot use."""

import shutil

import pytest
from gemma4q_kernels.ggml import GGMLQuantizationType
from gguf_files import gemma4_metadata, write_gguf
from quantize_runs import NEW_HELP, llama, plan, with_imatrices
from test_gguf_cli import gguf_mixed

COMMANDS = {
    "fisher, model": ("fisher", "model.gguf", "-o", "model.gguf", "--text", "text.txt"),
    "fisher, text": ("fisher", "model.gguf", "-o", "text.txt", "--text", "text.txt"),
    "plan, imatrix": ("plan", "model.gguf", "--recipe", "rank15", "--imatrix", "imatrix.gguf", "-o", "imatrix.gguf"),
    "plan, sensitivity": (
        "plan", "model.gguf", "--recipe", "optimal", "--bpw", "6", "--sensitivity", "found.csv", "-o", "found.csv",
    ),
    "imatrix": ("imatrix", "imatrix.dat", "--write", "imatrix.dat"),
    "weigh-imatrix": ("weigh-imatrix", "imatrix.gguf", "fisher.safetensors", "-o", "fisher.safetensors"),
    "compute-imatrix": (
        "compute-imatrix", "model.gguf", "-o", "text.txt", "--text", "text.txt", "--llama-cpp", "tools",
    ),
    "quantize": (
        "quantize", "model.gguf", "imatrix.gguf", "--overrides", "table.txt", "--imatrix", "imatrix.gguf",
        "--llama-cpp", "tools", "--overwrite",
    ),
    "a link": ("imatrix", "imatrix.dat", "--write", "link.dat"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = with_imatrices(tmp_path_factory.mktemp("made"))
    plan(folder, "rank15", "--imatrix", folder / "imatrix.gguf")
    tool = llama(folder, f'echo "{NEW_HELP}"')
    shutil.copy(tool, tool.with_name("llama-imatrix"))
    (folder / "text.txt").write_text("A text. " * 100)
    (folder / "found.csv").write_text("QTYPE\n")
    (folder / "fisher.safetensors").write_bytes(b"not looked at")
    (folder / "link.dat").symlink_to("imatrix.dat")
    return folder


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_read_is_not_written_over(name, made, monkeypatch):
    monkeypatch.chdir(made)
    before = content(made)
    finished = gguf_mixed(*COMMANDS[name])
    output = next(word for word in COMMANDS[name] if COMMANDS[name].count(word) == 2 or word == "link.dat")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == f"error: {output}: is read and would be written over: another name\n"
    assert content(made) == before


def test_fisher_of_a_quantized_model(tmp_path):
    """Told before the checkpoint is loaded, which is all of a model."""
    model = write_gguf(
        tmp_path / "q8.gguf", [("token_embd.weight", (256, 4), GGMLQuantizationType.Q8_0)], gemma4_metadata(1, 256, 256)
    )
    (tmp_path / "text.txt").write_text("A text.")
    given = ["--text", tmp_path / "text.txt", "--checkpoint", tmp_path / "none"]
    finished = gguf_mixed("fisher", model, "-o", tmp_path / "out", *given)
    assert finished.stderr == "error: tensor token_embd.weight is Q8_0, expected F32, F16 or BF16\n"
    assert not (tmp_path / "out").exists()


def test_a_llama_quantize_of_another_machine(made, tmp_path):
    (tmp_path / "llama-quantize").write_bytes(b"\x7fELF of another kind")
    (tmp_path / "llama-quantize").chmod(0o755)
    given = ["--recipe", "stock-q4_k_m", "-o", tmp_path / "table.txt", "--llama-cpp", tmp_path]
    finished = gguf_mixed("plan", made / "model.gguf", *given)
    assert (finished.returncode, finished.stderr.count("\n")) == (2, 1)
    assert finished.stderr.startswith(f"error: {tmp_path}/llama-quantize: does not run: ")
