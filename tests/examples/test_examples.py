"""The serving scripts: what they hand to `vllm serve`, parsed by vLLM itself, and the arithmetic in their headers.

A `vllm` that writes down its arguments stands first on PATH, so that the shell does all quoting and expansion;
then vLLM's own parser, in a process of its own, reads every list of arguments. No server is started.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from synthetic import CONFIG_31B, shapes, small_config, write_checkpoint, write_header_only

from vllm_gemma4q.architecture import FULL_ATTENTION, is_linear_weight, parse_text_architecture
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.quark_int8 import quantize

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))
FOUR_CARDS, ONE_CARD, ANY_CARD = "serve_int8_4x24gb_rdna3.sh", "serve_int8_1x48gb.sh", "quantize_and_serve.sh"
HOPPER = "serve_fp8_hopper.sh"
PRUNED = ("prune_and_serve_int8.sh", "prune_to_gguf.sh")  # of which test_prune_examples.py tells more
MULTI = "multi_node.sh"
EXL3 = "quantize_exl3_and_serve.sh"  # of which tests/exl3/test_exl3_example.py tells more
COMPARE = "compare.sh"  # of which tests/compare/test_compare_measured.py tells more
MODEL = "a folder/with spaces"
RECORDER = '#!/bin/sh\nprintf "%s\\0" "$@" > "$RECORD"\n'
PARSER = """
import json, sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
command = ServeSubcommand()
command.subparser_init(parser.add_subparsers(dest="subparser"))
kept = (str, int, bool, float, dict)
results = []
for arguments in json.load(sys.stdin):
    try:
        parsed = parser.parse_args(arguments)
        command.validate(parsed)
        results.append({key: value for key, value in vars(parsed).items() if type(value) in kept})
    except SystemExit as exit:
        results.append({"refused": exit.code})
print(json.dumps(results))
"""
GIB = 2**30
FLIGHT = 2048
HOPPER_FLIGHT = 8192
ADMISSION = 1023 + FLIGHT + 16  # tokens of a sliding layer for which vLLM admits a sequence: window, in flight, a block


def run_script(
    script: str, *arguments: str, folder: Path, path: Sequence[Path] = ()
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a script with the recording `vllm`; what it was called with, or nothing."""
    folder.mkdir(exist_ok=True)
    recorder, record = folder / "vllm", folder / "record"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    search = ":".join([*map(str, (folder, *path)), os.environ["PATH"]])
    result = subprocess.run(
        [EXAMPLES / script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PATH": search, "RECORD": str(record)},
    )
    return result, record.read_text().split("\0")[:-1] if record.exists() else []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_is_a_strict_posix_script(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/sh"
    assert "set -eu" in lines
    assert "NOT measured" in script.read_text()
    assert os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", script], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_missing_checkpoint_is_a_usage_error(script: Path, tmp_path: Path) -> None:
    result, called = run_script(script.name, folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ")
    assert "CHECKPOINT" in result.stderr
    assert (result.stdout, called) == ("", [])


def test_there_are_scripts() -> None:
    assert {script.name for script in SCRIPTS} == {
        FOUR_CARDS,
        ONE_CARD,
        ANY_CARD,
        HOPPER,
        *PRUNED,
        EXL3,
        COMPARE,
        MULTI,
    }


def test_quantizes_what_is_not_a_checkpoint_into_an_error(tmp_path: Path) -> None:
    """Bad input to the first line must keep the second from running."""
    (tmp_path / "empty").mkdir()
    result, called = run_script(ANY_CARD, "empty", folder=tmp_path, path=[Path(sys.executable).parent])
    assert result.returncode == 2
    assert "config.json" in result.stderr
    assert called == []


def test_quantizes_then_serves(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "my model", small_config())
    arguments = ["my model/", "--port", "8001"]
    result, called = run_script(ANY_CARD, *arguments, folder=tmp_path, path=[Path(sys.executable).parent])
    assert result.returncode == 0, result.stderr
    assert called == ["serve", "my model-int8", "--port", "8001"]
    written = json.loads((tmp_path / "my model-int8" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "quark"


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, Any]]:
    """Everything that has to be parsed, by a label, in one process of vLLM's."""
    folder = tmp_path_factory.mktemp("parsed")
    lists = {}
    more = {
        "as it is": [],
        "triton": ["--linear-backend", "triton"],
        "another length": ["--max-model-len", "4096"],
        "fp8": ["--kv-cache-dtype", "fp8", "--max-model-len", "131072"],
        "unknown flag": ["--no-such-flag"],
        "unknown backend": ["--linear-backend", "gemma4q"],
        "unknown cache": ["--kv-cache-dtype", "int3"],
    }
    for script in (FOUR_CARDS, ONE_CARD, HOPPER):
        for label, flags in more.items():
            result, called = run_script(script, MODEL, *flags, folder=folder)
            assert result.returncode == 0, result.stderr
            lists[f"{script}: {label}"] = called
    for rank in ("0", "1"):
        arguments = [MODEL, "2", rank, "10.0.0.1", "--enable-expert-parallel"]
        result, lists[f"{MULTI}: rank {rank}"] = run_script(MULTI, *arguments, folder=folder)
        assert result.returncode == 0, result.stderr
    lists[f"{MULTI}: by Ray"] = by_ray()[1:]
    process = subprocess.run(
        [sys.executable, "-c", PARSER], input=json.dumps(list(lists.values())), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return dict(zip(lists, json.loads(process.stdout.splitlines()[-1]), strict=True))


@pytest.mark.engine
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            FOUR_CARDS,
            {
                "tensor_parallel_size": 4,
                "max_model_len": 8192,
                "max_num_batched_tokens": FLIGHT,
                "gpu_memory_utilization": 0.90,
                "limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0},
                "linear_backend": "auto",
                "kv_cache_dtype": "auto",
            },
        ),
        (
            ONE_CARD,
            {
                "tensor_parallel_size": 1,
                "max_model_len": 32768,
                "max_num_batched_tokens": FLIGHT,
                "gpu_memory_utilization": 0.92,
                "limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0},
                "kv_cache_dtype": "auto",
            },
        ),
        (
            HOPPER,
            {
                "tensor_parallel_size": 1,
                "max_model_len": 131072,
                "enable_chunked_prefill": True,
                "max_num_batched_tokens": HOPPER_FLIGHT,
                "gpu_memory_utilization": 0.90,
                "limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0},
                "enable_auto_tool_choice": True,
                "tool_call_parser": "gemma4",
                "reasoning_parser": "gemma4",
                "kv_cache_dtype": "auto",
            },
        ),
    ],
)
def test_vllm_reads_the_flags_as_meant(
    parsed: Mapping[str, dict[str, Any]], script: str, expected: dict[str, Any]
) -> None:
    got = parsed[f"{script}: as it is"]
    assert {**expected, "model_tag": MODEL} == {key: got.get(key) for key in [*expected, "model_tag"]}


def by_ray() -> list[str]:
    """The command in the header of the script for several machines."""
    lines = (EXAMPLES / MULTI).read_text().splitlines()
    return next(line for line in lines if "--distributed-executor-backend" in line).removeprefix("#").split()


@pytest.mark.engine
def test_vllm_reads_the_flags_of_each_machine(parsed: Mapping[str, dict[str, Any]]) -> None:
    shared = {
        "model_tag": MODEL,
        "tensor_parallel_size": 8,
        "pipeline_parallel_size": 2,
        "nnodes": 2,
        "master_addr": "10.0.0.1",
        "master_port": 29501,
        "enable_expert_parallel": True,
    }
    for rank, headless in ((0, False), (1, True)):
        got = parsed[f"{MULTI}: rank {rank}"]
        expected = {**shared, "node_rank": rank, "headless": headless}
        assert expected == {key: got.get(key) for key in expected}
    got = parsed[f"{MULTI}: by Ray"]
    expected = {
        "distributed_executor_backend": "ray",
        "tensor_parallel_size": 8,
        "pipeline_parallel_size": 2,
        "nnodes": 1,
    }
    assert expected == {key: got.get(key) for key in expected}


@pytest.mark.engine
@pytest.mark.parametrize("script", [FOUR_CARDS, ONE_CARD, HOPPER])
def test_flags_of_the_caller_win(parsed: Mapping[str, dict[str, Any]], script: str) -> None:
    assert parsed[f"{script}: triton"]["linear_backend"] == "triton"
    assert parsed[f"{script}: another length"]["max_model_len"] == 4096
    fp8 = parsed[f"{script}: fp8"]
    assert (fp8["kv_cache_dtype"], fp8["max_model_len"]) == ("fp8", 131072)


@pytest.mark.engine
@pytest.mark.parametrize("script", [FOUR_CARDS, ONE_CARD, HOPPER])
@pytest.mark.parametrize("what", ["flag", "backend", "cache"])
def test_vllm_refuses_what_it_does_not_know(parsed: Mapping[str, dict[str, Any]], script: str, what: str) -> None:
    """Backends and cache types are closed lists; without this, no other test here would mean much."""
    assert parsed[f"{script}: unknown {what}"] == {"refused": 2}


def kv_bytes(tokens: int, element: int, window: int = ADMISSION) -> int:
    """KV cache of one sequence of the 31B: `window` is what a sliding layer keeps of it, `element` bytes a number."""
    total = 0
    for layer in parse_text_architecture(CONFIG_31B).layers:
        kept = tokens if layer.layer_type == FULL_ATTENTION else min(tokens, window)
        total += 2 * layer.num_key_value_heads * layer.head_dim * kept * element
    return total


def weight_bytes(folder: Path, vision: bool) -> int:
    """What vLLM holds: the checkpoint, and the keys of layers without values once more."""
    source = write_header_only(folder, CONFIG_31B, shapes(CONFIG_31B).items())
    conversion = quantize.plan(open_checkpoint(source))
    outputs = [output for step in conversion.steps for output in step.outputs]
    architecture = parse_text_architecture(CONFIG_31B)
    keys = [f".layers.{layer.index}.self_attn.k_proj.weight" for layer in architecture.layers if not layer.has_value]
    repeated = sum(output.n_bytes for output in outputs if output.name.endswith(tuple(keys)))
    return repeated + sum(output.n_bytes for output in outputs if vision or "language_model" in output.name)


def test_arithmetic_of_four_cards(tmp_path: Path) -> None:
    text = (EXAMPLES / FOUR_CARDS).read_text()
    weights = weight_bytes(tmp_path / "source", vision=False) / 4 / GIB
    sequence = kv_bytes(8192, 2, window=1024) / 4 / GIB
    free = 24 * 0.90 - weights
    assert f"a quarter a card: {weights:.2f}." in text
    assert f"less weights: {free:.2f}; less 3 for activations, graphs and RCCL (a guess): {free - 3:.2f}." in text
    assert f"takes {sequence:.2f} " in text
    assert f"read {kv_bytes(8192, 2) / 4 / GIB:.2f}." in text
    assert f"about {int((free - 3) / sequence)} full sequences" in text


def test_arithmetic_of_one_card(tmp_path: Path) -> None:
    text = (EXAMPLES / ONE_CARD).read_text()
    weights = weight_bytes(tmp_path / "source", vision=True) / GIB
    left = 46068 / 1024 * 0.92 - weights - 2
    assert f"Together {weights:.2f}." in text
    assert f"(a guess): {left:.2f} for the KV cache" in text
    for tokens in (32768, 65536, 131072, 262144):
        row = [tokens, kv_bytes(tokens, 2) / GIB, kv_bytes(tokens, 1) / GIB]
        assert "#{:>19}{:>9.2f}{:>8.2f}\n".format(*row) in text
    assert kv_bytes(65536, 2) / GIB < left < kv_bytes(131072, 2) / GIB
    assert kv_bytes(131072, 1) / GIB < left < kv_bytes(262144, 1) / GIB


def test_arithmetic_of_hopper() -> None:
    """FP8 weights take a byte an element; their scales, two numbers a linear, are not worth a line."""
    text = (EXAMPLES / HOPPER).read_text()
    tensors = shapes(CONFIG_31B)
    elements = {name: math.prod(shape) for name, shape in tensors.items()}
    in_file = sum(size * (1 if is_linear_weight(name, tensors[name]) else 2) for name, size in elements.items())
    layers = [layer.index for layer in parse_text_architecture(CONFIG_31B).layers if not layer.has_value]
    repeated = sum(elements[f"model.language_model.layers.{layer}.self_attn.k_proj.weight"] for layer in layers)
    weights = (in_file + repeated) / GIB
    left = 81559 / 1024 * 0.90 - weights - 4
    window = 1023 + HOPPER_FLIGHT + 16
    assert f"weights   {in_file / 1e9:.2f} GB = {in_file / GIB:.2f}:" in text
    assert f"Together {weights:.2f}." in text
    assert f"(a guess): {left:.2f} for the KV cache" in text
    for tokens in (32768, 131072, 262144):
        row = [tokens, kv_bytes(tokens, 2, window) / GIB, kv_bytes(tokens, 1, window) / GIB]
        assert "#{:>19}{:>9.2f}{:>8.2f}\n".format(*row) in text
    assert 2 * kv_bytes(131072, 2, window) / GIB < left < 3 * kv_bytes(131072, 2, window) / GIB
    assert kv_bytes(262144, 2, window) / GIB < left
    assert f"An H200 has {(143771 - 81559) / 1024:.1f} GiB more." in text
