"""llama-imatrix and llama-perplexity as scripts that print what b11434 prints: no llama.cpp is needed."""

import json
import sys

import in_process
import pytest
from gguf_files import gemma4_metadata, small_moe, write_gguf

from gguf_mixed.errors import InputError
from gguf_mixed.imatrix_compute import compute_imatrix
from gguf_mixed.perplexity import base_bytes, write_base

CHUNKS, CONTEXT, VOCABULARY = 4, 64, 96
# What is left of llama-perplexity: the base is of the right size, and the figures are made up. A model named c fails.
PERPLEXITY = f"""
import struct, sys
if "--help" in sys.argv:
    sys.exit(print("usage"))
base = sys.argv[sys.argv.index("--kl-divergence-base") + 1]
if "--kl-divergence" not in sys.argv:
    header = struct.pack("<8siii", b"_logits_", {CONTEXT}, {VOCABULARY}, {CHUNKS})
    open(base, "wb").write(header.ljust({base_bytes(VOCABULARY, CHUNKS, CONTEXT)}, b"."))
elif sys.argv[sys.argv.index("-m") + 1].endswith("c.gguf"):
    sys.exit(print("error: out of memory") or 1)
else:
    print("   {CHUNKS}    10.0 ±    0.1    0.01 ±    0.01    0.02 ±    0.01")
    for line in ("Mean PPL(Q)", "Mean PPL(base)", "Mean PPL(Q)/PPL(base)", "Mean    KLD"):
        print(line + "   :   0.125000 ±   0.500000")
    for line in ("Maximum KLD", "99.9%   KLD", "99.0%   KLD", "95.0%   KLD", "90.0%   KLD", "Median  KLD"):
        print(line + ":   0.250000")
    print("Same top p: 75.000 ± 1.000 %")
"""


def tool(folder, name, program):
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{program}\n")
    path.chmod(0o755)
    return path


def announcing(folder, name, line):
    """Says how many chunks there are, and then takes five seconds for them."""
    program = "import sys, time\nif '--help' in sys.argv: sys.exit(print('usage'))\n"
    done = f"time.sleep(5)\nopen({str(folder / 'ran-on')!r}, 'w')"
    return tool(folder, name, f"{program}print({line!r}, flush=True)\n{done}")


@pytest.fixture
def model(tmp_path):
    (tmp_path / "text.txt").write_text("text")
    return write_gguf(tmp_path / "model.gguf", small_moe())


def imatrix(tool, model, output):
    compute_imatrix(tool, model, model.with_name("text.txt"), output, chunks=500, context=CONTEXT)


def base(tool, model, output):
    write_base(tool, model, model.with_name("text.txt"), output, chunks=500, context=CONTEXT)


@pytest.mark.parametrize("stamp", ["", "0.00.180.391 I "])
@pytest.mark.parametrize(
    ("run", "said"),
    [
        (imatrix, "compute_imatrix: computing over 480 chunks, n_ctx=64, batch_size=64, n_seq=1"),
        (base, "perplexity: calculating perplexity over 480 chunks, n_ctx=64, batch_size=64, n_seq=1"),
    ],
)
def test_a_text_of_fewer_chunks_stops_the_program(tmp_path, model, run, said, stamp):
    program = announcing(tmp_path, "llama", stamp + said)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"^text.txt: too small: 480 chunks of 64 tokens, asked were 500$"):
        run(program, model, tmp_path / "output")
    assert sorted(tmp_path.iterdir()) == before


def divergence(folder, *models):
    tool(folder, "llama-perplexity", PERPLEXITY)
    names = [folder / f"{name}.gguf" for name in models]
    size = ["--chunks", CHUNKS, "--context", CONTEXT, "--base", folder / "base.kld"]
    given = [folder / "model.gguf", *names, "--text", folder / "text.txt", *size, "--llama-cpp", folder]
    return in_process.run("gguf-mixed", "divergence", *given, "--json")


def test_models_that_are_done_are_told_when_a_later_one_fails(tmp_path, model):
    for name in "abc":
        (tmp_path / f"{name}.gguf").symlink_to(model)
    finished = divergence(tmp_path, "a", "b")
    figures = "mean KLD, nats 0.1250 ±0.5000; 99% 0.250; same top 75.0%"
    told = [f"a.gguf: {figures}", f"b.gguf: {figures}"]
    assert (finished.returncode, finished.stderr.splitlines()[1:]) == (0, told)
    assert [entry["divergence"]["mean_kld"] for entry in json.loads(finished.stdout)["models"]] == [0.125] * 2
    finished = divergence(tmp_path, "a", "b", "c")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.splitlines()[1:] == [*told, "error: llama-perplexity: exit 1: error: out of memory"]
    assert finished.stderr.startswith("base file ")
    finished = divergence(tmp_path, "a")
    assert finished.stderr.count("\n") == 1  # the base: the result follows at once


def test_another_vocabulary_is_refused_before_anything_runs(tmp_path, model):
    (tmp_path / "a.gguf").symlink_to(model)
    listed = [(name, (256, 8) if name == "token_embd.weight" else shape, qtype) for name, shape, qtype in small_moe()]
    write_gguf(tmp_path / "c.gguf", listed, gemma4_metadata(2, 256, 256))
    finished = divergence(tmp_path, "a", "c")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "error: model.gguf: vocabulary of 96, c.gguf has 8\n"
    assert not (tmp_path / "base.kld").exists()
