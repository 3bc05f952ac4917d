"""Importing, quantizing and serving reach nothing beyond this machine, and serving runs no code of a checkpoint."""

import json
import sys
from pathlib import Path

import pytest
from supply import guarded
from vllm_plugin.checkpoints import quantize

ROOT = Path(__file__).resolve().parents[2]
DENSE = ROOT / "examples" / "small_gemma4" / "dense"
GEMMA4Q = str(Path(sys.executable).with_name("gemma4q"))

IMPORT_ALL = """
import importlib, pkgutil
names = []
for package in ("vllm_gemma4q", "gguf_mixed", "gemma4q_kernels"):
    paths = importlib.import_module(package).__path__
    names += [found.name for found in pkgutil.walk_packages(paths, f"{package}.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
SERVE = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    small = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16, "enable_prefix_caching": False}
    llm = LLM(sys.argv[1], limit_mm_per_prompt={"image": 1, "video": 0, "audio": 0}, **small)
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": list(range(20, 60))}], sampling)
    print("answered", len(outputs[0].outputs[0].token_ids))
"""
# What vLLM tries by itself: its own statistics, and a datagram socket, never written to, that tells its own address.
# README says which variables turn both off.
OF_VLLM = {"socket.getaddrinfo stats.vllm.ai", "socket.connect 8.8.8.8", "socket.connect 2001:4860:4860::8888"}


def test_the_guard_stops_a_connection(tmp_path: Path) -> None:
    attempt = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    done, attempts = guarded.run([sys.executable, "-c", attempt], tmp_path)
    assert "PermissionError" in done.stderr
    assert attempts == ["socket.getaddrinfo 192.0.2.1"]


@pytest.mark.slow
def test_importing_every_module_reaches_nothing(tmp_path: Path) -> None:
    done, attempts = guarded.run([sys.executable, "-c", IMPORT_ALL], tmp_path)
    assert done.returncode == 0, done.stderr
    modules = sum(len(list((ROOT / name).rglob("*.py"))) for name in ("vllm_gemma4q", "gguf_mixed", "kernels"))
    assert int(done.stdout.split()[-1]) > 0.9 * modules
    assert attempts == []


@pytest.mark.slow
def test_quantizing_reaches_nothing(tmp_path: Path) -> None:
    command = [GEMMA4Q, "quantize", str(DENSE), str(tmp_path / "int8"), "--scheme", "quark-int8"]
    done, attempts = guarded.run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert attempts == []


def with_code(checkpoint: Path, marker: Path) -> None:
    """Give a checkpoint Python files, and configurations that ask for them; running them leaves the marker."""
    for module in ("configuration_evil", "modeling_evil", "tokenization_evil", "processing_evil"):
        (checkpoint / f"{module}.py").write_text(f"open({str(marker)!r}, 'a').write({module!r})\n")
    wanted = {
        "config.json": {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"},
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_evil.Evil", None]},
        "processor_config.json": {"AutoProcessor": "processing_evil.Evil"},
    }
    for name, auto_map in wanted.items():
        path = checkpoint / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))


@pytest.mark.slow
@pytest.mark.engine
def test_serving_reaches_nothing_of_ours_and_runs_no_code_of_a_checkpoint(tmp_path: Path) -> None:
    checkpoint, marker = quantize(DENSE, tmp_path / "int8"), tmp_path / "ran"
    with_code(checkpoint, marker)
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done, attempts = guarded.run([sys.executable, str(script), str(checkpoint)], tmp_path, **small)
    assert "answered 4" in done.stdout, done.stdout + done.stderr
    assert not marker.exists()
    assert set(attempts) <= OF_VLLM
