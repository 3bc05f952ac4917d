"""Tune on CPU tensors in Triton's interpreter; run with TRITON_INTERPRET=1. argv: the folder for the tables.

Every step that a GPU takes but compiling: times (of the interpreter), checks of what tiles compute, search, files.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from gemma4q_kernels.grouped_mm import tiles as grouped_tiles
from gemma4q_kernels.int8_scaled_mm import tiles
from gemma4q_kernels.int8_scaled_mm.tiles import Row, Tile

from vllm_gemma4q.benchmark import tune
from vllm_gemma4q.benchmark.candidates import Band
from vllm_gemma4q.benchmark.shapes import Experts, Shape

CPU = torch.device("cpu")
DENSE = (Band(16, (1,), (16,), splits=True), Band(None, (17,), (16,)))
EXPERTS = (Band(8, (1, 2), (16,)), Band(None, (9,), (32,)))
SHAPES = (Shape(40, 176), Shape(64, 256))
FACTS = {
    "architecture": "cpu",
    "compute_units": 4,
    "gpu": "Triton's interpreter",
    "versions": {"torch": torch.__version__},
}


def is_usable(tile: Tile) -> bool:
    """A few of the candidates: the interpreter takes milliseconds for each block."""
    return (tile.block_n, tile.block_k, tile.num_warps, tile.num_stages) in (
        (64, 64, 4, 4),
        (64, 128, 4, 4),
        (64, 64, 4, 3),
    )


def main() -> None:
    folder = Path(sys.argv[1])
    done: list[int] = []
    in_use = tiles.table("cpu")[0]
    tuner = tune.Tuner(CPU, in_use, 4, is_usable, 0.0, lambda: done.append(1), torch.float32)
    planned = tuner.plan(DENSE, [(shape.n, shape.k) for shape in SHAPES], amd=False)
    times = tuner.dense(SHAPES, planned)
    assert len(done) == sum(map(len, planned.values())) == sum(map(len, times.values())) > 0
    assert all(seconds > 0 for by_choice in times.values() for seconds in by_choice.values())
    assert {choice.split_k for by_choice in times.values() for choice in by_choice} == {1, "auto"}
    path = tune.write_table(folder, tune.make_table(times, DENSE, False, **FACTS))
    print("dense", len(tiles.load(path).rows))

    experts = Experts(count=4, top_k=2, hidden=64, width=32)
    sizes = [(64, 64), (64, 32)]
    grouped = dataclasses.replace(tuner, in_use=grouped_tiles.table("cpu"))
    times = grouped.experts([experts], grouped.plan(EXPERTS, sizes, amd=False))
    path = tune.write_table(folder / "grouped_mm", tune.make_table(times, EXPERTS, True, **FACTS))
    print("experts", len(tiles.load(path).rows))
    check_wrong_sums(tuner)


def check_wrong_sums(tuner: tune.Tuner) -> None:
    """A tile that computes something else is an error that names it."""
    right = tune.launch
    tune.launch = lambda *arguments: right(*arguments) + 1
    row = Row(tile=Tile(block_m=16, block_n=32, block_k=64, num_warps=4, num_stages=2))
    planned = {tune.Problem(1, 40, 176): [tune.Choice(row.tile, 1)]}
    try:
        dataclasses.replace(tuner).dense(SHAPES[:1], planned)
    except ValueError as error:
        print("refused:", error)
    finally:
        tune.launch = right


if __name__ == "__main__":
    main()
