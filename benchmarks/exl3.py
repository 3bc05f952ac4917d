"""Encoding EXL3 on a CPU: milliseconds a tile of 256 weights, and how well normally distributed tiles are encoded.

    .venv/bin/python benchmarks/exl3.py [--tiles 256] [--threads 1] [--loaded]

For every codebook and number of bits: the search by numba, with packing, beside the same search in plain torch (the
peer) and beside published figures of a naive one in C++. Wall time and CPU time of the whole process
are both reported, a tile; on a loaded machine (`--loaded` records that) the second is the one to read. Compilation is
apart. NMSE is the squared error over the sum of squares at the scale of tiles that is best for so many bits.
Goal: less than 15 ms a tile and core at 4 bits. Results go to benchmarks/results/exl3.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gemma4q_kernels.exl3 import CODEBOOKS, encode
from gemma4q_kernels.exl3.reference import values
from result_file import on_this_cpu, write

ROOT = Path(__file__).resolve().parent.parent
GOAL_MS = 15.0  # a tile and core at 4 bits
NAIVE_MS = {3: 195.0, 4: 71.0, 8: 17.0}
PUBLISHED_NMSE = {3: 0.0179, 4: 0.0048}
BITS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
HALF_BITS = [1.5, 2.5, 3.5]
SCALES = [0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15]
SCALE_TILES, TORCH_TILES = 48, 8


def nmse(tiles: torch.Tensor, bits: float, codebook: str, scale: float) -> float:
    """Relative squared error of normally distributed tiles, encoded at a multiple of the codebook's deviation."""
    scaled = tiles * (scale * float(values(torch.arange(1 << 16), codebook).float().std()))
    error = encode(scaled, bits, codebook).values - scaled
    return float(error.double().square().sum() / scaled.double().square().sum())


def timed(run: Callable[[], object], tiles: int) -> dict[str, float]:
    """Milliseconds a tile."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall_ms": round(1e3 * wall / tiles, 3), "cpu_ms": round(1e3 * cpu / tiles, 3)}


def measured(tiles: torch.Tensor, bits: float, codebook: str) -> dict[str, Any]:
    """One row of the table."""
    scale = min(SCALES, key=lambda each: nmse(tiles[:SCALE_TILES], bits, codebook, each))
    found: dict[str, Any] = {"codebook": codebook, "bits": bits, "scale": scale}
    found["nmse"] = float(f"{nmse(tiles, bits, codebook, scale):.4g}")
    found["nmse_over_bound"] = round(found["nmse"] * 4**bits, 3)  # no code of so many bits is below 4^-bits
    found["numba"] = timed(lambda: encode(tiles, bits, codebook, backend="numba"), len(tiles))
    few = tiles[:TORCH_TILES]
    found["torch"] = timed(lambda: encode(few, bits, codebook, backend="reference"), len(few))
    for name, table in (("naive_ms", NAIVE_MS), ("published_nmse", PUBLISHED_NMSE)):
        if (figure := table.get(int(bits))) is not None and bits.is_integer():
            found[name] = figure
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--loaded", action="store_true", help="other work runs on this machine")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "exl3.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tiles = torch.randn((arguments.tiles, 16, 16), generator=torch.Generator().manual_seed(0))
    compilation = timed(lambda: encode(tiles[:1], 4, "mcg", backend="numba"), 1)
    rows = []
    for codebook in CODEBOOKS:
        for bits in sorted(BITS + (HALF_BITS if codebook == "mul1" else [])):
            rows.append(measured(tiles, bits, codebook))
            print(json.dumps(rows[-1]), flush=True)
    at_goal = [row["numba"]["cpu_ms"] for row in rows if row["bits"] == 4]
    result = {
        **on_this_cpu(arguments.loaded, "numba"),
        "tiles": arguments.tiles,
        "compilation": compilation,
        "goal": {"cpu_ms_at_4_bits": GOAL_MS, "met": max(at_goal) < GOAL_MS},
        "rows": rows,
    }
    write(arguments.output, result)


if __name__ == "__main__":
    main()
