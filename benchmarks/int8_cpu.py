"""INT8 linears on a CPU: which of the operators that torch and vLLM offer is fastest, by Gemma 4's shapes and M.

    .venv/bin/python benchmarks/int8_cpu.py [--model 31B] [-m 1 16 256] [--seconds 0.6] [--threads 2] [--loaded]

What `gemma4q bench` times (medians, BF16 in and out, weights beyond the cache), and for each problem the fastest, its
ratio to bfloat16's F.linear, and ours: the layout for few rows up to 64 rows, the default above. Goal: ours at least as
fast as the best of vLLM's two operators, where 5% are taken for noise.
`--loaded` records that other work ran on the machine. Results go to benchmarks/results/int8_cpu.json.
"""

import argparse
import dataclasses
import json
import os
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from result_file import on_this_cpu, write

from vllm_gemma4q.benchmark.contenders import OURS, OURS_FEW_ROWS
from vllm_gemma4q.benchmark.linear import Effort, Row, compare
from vllm_gemma4q.benchmark.shapes import MODELS, sizes_of

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
GOAL, NOISE = 1.0, 0.05  # of the best of vLLM's two; two runs of one operator differ by as much


def verdict(rows: list[Row]) -> dict[str, Any]:
    """The fastest contender of one problem, and ours beside vLLM's."""
    seconds = {row.contender: row.seconds for row in rows if row.seconds is not None}
    ratios = {row.contender: round(row.ratio, 3) for row in rows if row.ratio is not None}
    fastest = min(seconds, key=lambda name: seconds[name])
    theirs = [time for name, time in seconds.items() if name.startswith("vllm ")]
    shape = rows[0].shape
    found = {"linear": shape.name, "n": shape.n, "k": shape.k, "m": rows[0].m, "fastest": fastest, "x_bf16": ratios}
    ours = seconds.get(OURS_FEW_ROWS, seconds[OURS])  # it only runs where it is meant to
    beside = round(min(theirs) / ours, 3) if theirs else None
    return {**found, "ours_over_best_of_vllm": beside, "met": beside is None or beside >= GOAL - NOISE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help=f"{', '.join(MODELS)}, or a checkpoint folder; default: all")
    parser.add_argument("-m", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--ranks", type=int, default=1, help="shapes of one of so many ranks")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each contender at each problem")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--loaded", action="store_true", help="other work runs on this machine")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "int8_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = sizes_of(arguments.model, arguments.ranks).linears
    rows: list[Row] = []
    verdicts: list[dict[str, Any]] = []
    found = compare(shapes, arguments.m, CPU, Effort(arguments.seconds))
    for _, group in groupby(found, key=lambda row: (row.shape, row.m)):
        rows += (problem := list(group))
        verdicts.append(verdict(problem))
        print(json.dumps(verdicts[-1]), flush=True)
    result = {
        **on_this_cpu(arguments.loaded),
        "goal": {"ours_over_best_of_vllm": GOAL, "noise": NOISE, "met": all(each["met"] for each in verdicts)},
        "problems": verdicts,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write(arguments.output, result)


if __name__ == "__main__":
    main()
