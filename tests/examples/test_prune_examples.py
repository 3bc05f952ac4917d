"""The pruning scripts: their commands as the real programs parse them, their sizes, and both run whole.

For the commands alone, programs that write down their arguments stand first on PATH. The runs are of the small trained
mixture, with 12 of its 16 experts, and every program is the real one.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import typer
from openai import OpenAI
from synthetic import CONFIG_26B_A4B, shapes, write_header_only

from gguf_mixed.cli import app as gguf_mixed
from gguf_mixed.drop_map import RetainedExperts
from gguf_mixed.imatrix_gguf import read_imatrix
from gguf_mixed.llama_cpp import find_tool
from gguf_mixed.perplexity import divergence, positions_of, write_base
from gguf_mixed.tensors import read_inventory
from gguf_mixed.tether import spawn
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.run import MANIFEST
from vllm_gemma4q.cli import application
from vllm_gemma4q.evaluation import server
from vllm_gemma4q.pruned_moe.prune import plan
from vllm_gemma4q.quark_int8 import quantize

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
from small_gemma4 import chats, corpus  # noqa: E402

SERVE, GGUF = "prune_and_serve_int8.sh", "prune_to_gguf.sh"
PROGRAMS = {"gemma4q": application(), "gguf-mixed": gguf_mixed}
RECORDER = '#!/bin/sh\nprintf "%s\\0" "$(basename "$0")" "$@" >> "$RECORD"; printf "\\n" >> "$RECORD"\n'
CONVERTER = '#!/bin/sh\nprintf "%s\\0" python3 "$@" >> "$RECORD"; printf "\\n" >> "$RECORD"; touch "$6"\n'
SMALL = {"KEEP": "12", "SAMPLES": "24", "LENGTH": "256", "REFIT_SAMPLES": "16", "OMP_NUM_THREADS": "1"}
CONTEXT, CHUNKS = 128, 8
BIN = Path(sys.executable).parent


def environment(path: Sequence[Path], **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in {*SMALL, "TIER", "DEVICE", "CONVERT"}}
    return {**kept, "PATH": ":".join([*map(str, path), os.environ["PATH"]]), **more}


def recorded(folder: Path, script: str, *arguments: str, **variables: str) -> list[list[str]]:
    """Programs with arguments, as the script calls them."""
    for name in (*PROGRAMS, "vllm", "python3"):
        (folder / name).write_text(CONVERTER if name == "python3" else RECORDER)
        (folder / name).chmod(0o755)
    record = folder / "record"
    record.write_text("")
    process = subprocess.run(
        [EXAMPLES / script, *arguments],
        cwd=folder,
        env=environment([folder], RECORD=str(record), **variables),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return [line.split("\0")[:-1] for line in record.read_text().split("\n")[:-1]]


def parsed(command: Sequence[str]) -> dict[str, Any]:
    """What the real program understands; it exits on a flag that it does not know."""
    group = typer.main.get_command(PROGRAMS[command[0]])
    subcommand = group.commands[command[1]]  # type: ignore[attr-defined]
    context = subcommand.make_context(command[1], list(command[2:]))
    return {"program": " ".join(command[:2]), **context.params}


def understood(calls: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    return [parsed(call) for call in calls if call[0] in PROGRAMS]


def check(found: dict[str, Any], **expected: Any) -> None:
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("script", [SERVE, GGUF])
def test_a_missing_text_is_a_usage_error(script: str) -> None:
    finished = subprocess.run([EXAMPLES / script, "a checkpoint"], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert re.fullmatch(r"usage: \S+ CHECKPOINT TEXT.*\n", finished.stderr)


def test_serving_commands_by_default(tmp_path: Path) -> None:
    calls = recorded(tmp_path, SERVE, "a model/", "some text", "--port", "8001")
    calibrate, prune, quantized = understood(calls)
    check(calibrate, program="gemma4q calibrate", source=Path("a model"), text=[Path("some text")])
    check(calibrate, target=Path("a model-statistics.safetensors"), samples=512, max_length=2048, raw=False)
    check(prune, program="gemma4q prune", source=Path("a model"), target=Path("a model-98e"), keep=98, refit=True)
    check(prune, statistics=Path("a model-statistics.safetensors"), text=[Path("some text")], samples=64)
    check(quantized, program="gemma4q quantize", source=Path("a model-98e"), target=Path("a model-98e-int8"))
    assert calls[3:] == [["vllm", "serve", "a model-98e-int8", "--port", "8001"]]


def test_environment_chooses(tmp_path: Path) -> None:
    calls = recorded(tmp_path, SERVE, "m", "text", **SMALL, DEVICE="cuda")
    calibrate, prune, _ = understood(calls)
    check(calibrate, samples=24, max_length=256, device="cuda")
    check(prune, target=Path("m-12e"), keep=12, samples=16, device="cuda")
    assert calls[3:] == [["vllm", "serve", "m-12e-int8"]]


def test_gguf_commands_by_default(tmp_path: Path) -> None:
    calls = recorded(tmp_path, GGUF, "a model/", "one text", "another", CONVERT="c/convert.py")
    calibrate, prune, again, imatrix, planned, written, verified, modelfile = understood(calls)
    texts, folder = [Path("one text"), Path("another")], Path("a model-98e-gguf")
    bf16, output = folder / "a model-98e-bf16.gguf", folder / "a model-98e-cd-q4_k_m.gguf"
    table, matrix = folder / "cd-q4_k_m.txt", folder / "imatrix.gguf"
    check(calibrate, source=Path("a model"), text=texts, samples=512, max_length=2048)
    check(prune, target=Path("a model-98e"), keep=98, text=texts, refit=True, samples=64)
    check(again, source=Path("a model-98e"), target=folder / "statistics.safetensors", text=texts, samples=512)
    check(imatrix, program="gguf-mixed imatrix", file=folder / "statistics.safetensors", write=matrix)
    check(planned, model=bf16, recipe="cd-q4_k_m", imatrix=matrix, output=table)
    check(written, model=bf16, output=output, overrides=table, imatrix=matrix)
    check(verified, program="gguf-mixed verify", written=output, overrides=table)
    check(modelfile, program="gguf-mixed modelfile", model=output)
    assert [call for call in calls if call[0] == "python3"] == [
        ["python3", "c/convert.py", "a model-98e", "--outtype", "bf16", "--outfile", f"{bf16}.partial"]
    ]
    assert (tmp_path / bf16).exists() and not (tmp_path / f"{bf16}.partial").exists()


def test_real_programs_refuse_a_flag_they_do_not_have(tmp_path: Path) -> None:
    call = next(call for call in recorded(tmp_path, SERVE, "m", "text") if call[1] == "prune")
    with pytest.raises(Exception, match="--no-such-flag"):
        parsed([*call, "--no-such-flag"])


def test_sizes_in_the_headers(tmp_path: Path) -> None:
    tensors = shapes(CONFIG_26B_A4B)
    source = open_checkpoint(write_header_only(tmp_path / "source", CONFIG_26B_A4B, tensors.items()))
    pruned = plan(source, RetainedExperts(128, (tuple(range(98)),) * 30))
    outputs = [(output.name, output.shape) for step in pruned.steps for output in step.written]
    int8 = quantize.plan(open_checkpoint(write_header_only(tmp_path / "pruned", dict(pruned.config), outputs)))
    work = 30 * 128 * 704 * 2816 * 2
    serve, gguf = ((EXAMPLES / script).read_text() for script in (SERVE, GGUF))
    assert f"BF16 {pruned.output_bytes / 1e9:.2f} GB, which becomes INT8 of {int8.output_bytes / 1e9:.2f} GB" in serve
    assert f"work ({work / 1e9:.2f} GB, and {2 * 2 * 2816 * 2 / 1e3:.0f} KB a token)" in serve
    assert f"BF16 {pruned.output_bytes / 1e9:.2f} GB" in gguf


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `moe`, the trained mixture, and `text.txt`: what it was trained on, manual and chats."""
    folder = tmp_path_factory.mktemp("pruned examples")
    (folder / "moe").symlink_to(EXAMPLES / "small_gemma4" / "moe")
    spoken = (
        "\n".join(message["content"] for message in chat.messages)
        for chat in islice(chats.generate(seed=3, held_out=False), 1000)
    )
    paragraphs = "\n\n".join([*corpus.training_sections()[:60], *spoken])
    (folder / "text.txt").write_text(paragraphs, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def served(small: Path, few_vllm_processes: None) -> Iterator[str]:
    """The script, left running until vLLM answers; the URL."""
    port, log = server._free_port(), small / "serve.log"
    flags = ["--port", str(port), "--max-model-len", "512", "--enforce-eager", "--served-model-name", server.MODEL_NAME]
    command = [str(EXAMPLES / SERVE), "moe", "text.txt", *flags]
    variables = environment([BIN], **SMALL, **server.CPU_ENVIRONMENT)
    with (
        log.open("wb") as output,
        spawn(command, 30, cwd=small, env=variables, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        server._wait_until_ready(process, port, log)
        yield f"http://127.0.0.1:{port}/v1"


@pytest.mark.engine
@pytest.mark.slow
def test_a_pruned_int8_mixture_answers(served: str, small: Path) -> None:
    question: Any = [{"role": "user", "content": "What is the capital of France?"}]
    client = OpenAI(base_url=served, api_key="none")
    answer = client.chat.completions.create(
        model=server.MODEL_NAME, messages=question, max_tokens=16, temperature=0
    ).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("Paris", "stop")
    config = json.loads((small / "moe-12e-int8" / "config.json").read_text())
    assert config["text_config"]["num_experts"] == 12
    assert config["quantization_config"]["quant_method"] == "quark"
    assert {shape[0] for shape in router_shapes(small / "moe-12e-int8")} == {12}
    manifest = json.loads((small / "moe-12e" / MANIFEST).read_text())
    assert manifest["details"]["refit"]["samples"] == 16
    assert not (small / "moe-12e.work").exists()


def router_shapes(folder: Path) -> list[tuple[int, ...]]:
    tensors = open_checkpoint(folder).tensors
    return [tensor.shape for name, tensor in tensors.items() if name.endswith("router.proj.weight")]


def make_gguf(small: Path, **variables: str) -> None:
    finished = subprocess.run(
        [EXAMPLES / GGUF, "moe", "text.txt"],
        cwd=small,
        env=environment([BIN], **SMALL, PYTHON=sys.executable, **variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "the size are as planned" in finished.stdout


@pytest.mark.slow
def test_a_pruned_gguf_is_as_planned_and_runs(small: Path) -> None:
    """Again with a smaller tier: finished steps are not repeated, and llama.cpp finds the smaller file further off."""
    folder = small / "moe-12e-gguf"
    bf16, output, smaller = (folder / f"moe-12e-{name}.gguf" for name in ("bf16", "cd-q4_k_m", "cd-q2_k"))
    make_gguf(small)
    assert (
        (folder / "Modelfile").read_text().startswith(f"FROM ./{output.name}\nRENDERER gemma4-large\nPARSER gemma4\n")
    )
    unchanged = [bf16, output, small / "moe-statistics.safetensors", *(small / "moe-12e").iterdir()]
    before = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in unchanged]
    make_gguf(small, TIER="cd-q2_k")
    assert [(path.stat().st_mtime_ns, path.stat().st_ino) for path in unchanged] == before
    assert f"FROM ./{smaller.name}\n" in (folder / "Modelfile").read_text()
    assert not list(folder.glob("*.partial"))

    model = read_inventory(output)
    assert model.headers[0].get("gemma4.expert_count") == 12
    matrix = read_imatrix(folder / "imatrix.gguf")
    assert matrix.matches(model) == ("token_embd.weight",)  # statistics hold what enters linears
    assert len(matrix.entries["blk.0.ffn_gate_up_exps.weight"].counts) == 12
    assert smaller.stat().st_size < output.stat().st_size < bf16.stat().st_size

    tool, base, held_out = find_tool("llama-perplexity"), small / "base.kld", small / "held-out.txt"
    held_out.write_text("\n\n".join(corpus.held_out_sections()), encoding="utf-8")
    write_base(tool, bf16, held_out, base, chunks=CHUNKS, context=CONTEXT, threads=1)
    found = [divergence(tool, path, base, threads=1) for path in (output, smaller)]
    assert [one.positions for one in found] == [CHUNKS * positions_of(CONTEXT)] * 2
    assert 0 < found[0].mean_kld < found[1].mean_kld
