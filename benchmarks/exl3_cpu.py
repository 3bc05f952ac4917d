"""Products with EXL3 weights on a CPU: decoded in registers, beside blocks in torch and dense weights.

    .venv/bin/python benchmarks/exl3_cpu.py [--threads 1] [--repeats 5] [--loaded]

A layer of Gemma 4 31B and one of 26B-A4B (2112 outputs, stored as 2176), 2 to 8 bits, 1 to 16 rows of bfloat16. The
whole linear is timed, rotations included. Contenders take turns; the least of `--repeats` wall and CPU times of the
process is reported, each on its own: on a loaded machine (`--loaded` records that) the second is the one to read.
Compilation is apart. Weights stay the same from one repeat to the next, and in a large cache where there is one: dense
ones gain most by that. GB/s are of packed or dense weights, by CPU time of a thread.
Goal: one row at 4 bits in a fifth of the time of blocks. Results go to benchmarks/results/exl3_cpu.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gemma4q_kernels.exl3 import Exl3Weight, cpu, linear
from result_file import on_this_cpu, write
from torch.nn.functional import linear as dense_linear

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(5376, 5376), (2816, 2176)]  # in, out
BITS, ROWS, CODEBOOK = [2, 3, 4, 6, 8], [1, 4, 16], "mcg"
GOAL = 5.0


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds: wall time, CPU time of the process."""
    wall, cpu_time = time.perf_counter(), time.process_time()
    run()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu_time)


def least(contenders: dict[str, tuple[Callable[[], object], int]], repeats: int) -> dict[str, dict[str, float]]:
    """Of contenders and their bytes of weights: the least times, in turns, after one run each that does not count."""
    for run, _ in contenders.values():
        run()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, (run, _) in contenders.items():
            times[name].append(timed(run))
    found = {}
    for name, (_, nbytes) in contenders.items():
        wall, cpu_time = map(min, zip(*times[name], strict=True))
        rate = round(nbytes / cpu_time / 1e6, 2)
        found[name] = {"wall_ms": round(wall, 2), "cpu_ms": round(cpu_time, 2), "gb_per_s": rate}
    return found


def random_weight(inputs: int, outputs: int, bits: int) -> Exl3Weight:
    """Any bits are a valid trellis."""
    trellis = torch.randint(-(2**15), 2**15, (inputs // 16, outputs // 16, 16 * bits), dtype=torch.int16)
    return Exl3Weight(trellis, torch.ones(inputs).half(), torch.ones(outputs).half(), CODEBOOK)


def by_blocks(x: torch.Tensor, weight: Exl3Weight) -> torch.Tensor:
    """The product as it is without numba."""
    few, cpu._FEW_ROWS = cpu._FEW_ROWS, 0
    try:
        return linear(x, [weight], backend="blocks")
    finally:
        cpu._FEW_ROWS = few


def measured(inputs: int, outputs: int, rows: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of the table: dense weights, then every number of bits."""
    x = torch.randn(rows, inputs, dtype=torch.bfloat16)
    at = {"in": inputs, "out": outputs, "rows": rows}
    dense = torch.randn(outputs, inputs)
    short, full = dense.bfloat16(), x.float()
    table = [
        least(
            {
                "float32": (lambda: dense_linear(full, dense), dense.nbytes),
                "bfloat16": (lambda: dense_linear(x, short), short.nbytes),
            },
            repeats,
        )
    ]
    for bits in BITS:
        weight = random_weight(inputs, outputs, bits)
        nbytes = weight.trellis.nbytes
        contenders = {
            "registers": (lambda w=weight: linear(x, [w], backend="blocks"), nbytes),
            "blocks": (lambda w=weight: by_blocks(x, w), nbytes),
        }
        table.append({"bits": bits, **least(contenders, repeats)})
    return [{**at, **row} for row in table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loaded", action="store_true", help="other work runs on this machine")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "exl3_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    small = torch.zeros((1, 128))
    wall, cpu_time = timed(lambda: linear(small, [random_weight(128, 128, 4)]))
    rows = []
    for inputs, outputs in SHAPES:
        for count in ROWS:
            for row in measured(inputs, outputs, count, arguments.repeats):
                rows.append(row)
                print(json.dumps(row), flush=True)
    goal = next(row for row in rows if row["rows"] == 1 and row.get("bits") == 4)
    ratio = goal["blocks"]["cpu_ms"] / goal["registers"]["cpu_ms"]
    result = {
        **on_this_cpu(arguments.loaded, "numba"),
        "codebook": CODEBOOK,
        "import_and_compilation": {"wall_ms": round(wall), "cpu_ms": round(cpu_time)},
        "goal": {"times_as_fast_as_blocks": GOAL, "measured": round(ratio, 2), "met": ratio >= GOAL},
        "rows": rows,
    }
    write(arguments.output, result)


if __name__ == "__main__":
    main()
