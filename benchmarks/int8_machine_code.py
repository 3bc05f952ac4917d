"""What our INT8 tiles and vLLM's compile to: registers, spills, shared memory, estimated occupancy, per architecture.

    .venv/bin/python benchmarks/int8_machine_code.py [--architecture gfx1100 ..]

No GPU is needed: both kernels are compiled ahead of time by the same Triton, with the same alignment, types and bias.
Contestants:

- gemma4q: every row of the tile tables that `gemma4q_kernels.int8_scaled_mm` launches from;
- vllm:    `triton_scaled_mm`'s own kernel, source unchanged, with all four tiles of its heuristic, which leaves warps
           and stages to the backend's defaults.

Registers are per thread; spills are registers on AMD and local-memory instructions on NVIDIA; occupancy is the share
of warps that fit an SM (or a WGP) by registers and shared memory. None of this is speed: a tile that spills is slow,
one that does not may be. Results go to benchmarks/results/.
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "numerics"))

import triton  # noqa: E402
from gemma4q_kernels.int8_scaled_mm.tiles import packaged, table  # noqa: E402
from gemma4q_kernels.int8_scaled_mm.triton import scaled_mm_kernel  # noqa: E402
from machine_code import MachineCode, compile_ahead  # noqa: E402
from triton import language as tl  # noqa: E402

# The heuristic of vLLM 0.32's triton_scaled_mm: (M, N) that it is for, and block sizes M, N, K.
VLLM_TILES = (
    ("M <= 32, N < 8192, or M <= 64", (64, 64, 256)),
    ("M <= 32, N >= 8192", (64, 128, 256)),
    ("M <= 128", (64, 128, 128)),
    ("M > 128", (128, 128, 128)),
)
# What the two backends of Triton 3.9 launch with when a caller says nothing: warps, stages.
DEFAULT_WARPS, DEFAULT_STAGES = 4, {"sm": 3, "gfx": 2}
POINTERS = {"x": "*i8", "x_scale": "*fp32", "w": "*i8", "w_scale": "*fp32", "bias": "*bf16", "out": "*bf16"}


@dataclass(frozen=True)
class Result:
    """One kernel with one tile on one architecture. tile: block M x N x K, warps, stages."""

    contestant: str
    architecture: str
    problems: str
    tile: str
    registers: int
    spills: int
    shared: int
    occupancy: float


def ours(architecture: str) -> list[Result]:
    results = []
    types = {f"{name}_ptr": dtype for name, dtype in POINTERS.items()}
    types |= dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn"), "i32")
    for row in table(architecture)[0].rows:
        tile = row.tile
        constants = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m}
        constants |= {"HAS_BIAS": True, "EVEN_K": True, "SPLIT_K": 1}
        limits = {"M": row.max_m, "N": row.max_n, "K": row.max_k}
        problems = ", ".join(f"{size} <= {limit}" for size, limit in limits.items() if limit) or "all larger"
        blocks = (tile.block_m, tile.block_n, tile.block_k)
        options = {"enable_fp_fusion": False}
        code = compiled(scaled_mm_kernel, architecture, types, constants, tile.num_warps, tile.num_stages, options)
        results.append(result("gemma4q", architecture, problems, blocks, tile.num_warps, tile.num_stages, code))
    return results


def vllm_kernel() -> Any:
    """vLLM's kernel, as installed. Without a GPU vLLM puts a stand-in where Triton would be, which is undone here."""
    from vllm.model_executor.layers.quantization.compressed_tensors import triton_scaled_mm

    kernel = triton_scaled_mm.scaled_mm_kernel
    if isinstance(kernel, triton.JITFunction):
        return kernel
    triton_scaled_mm.tl = tl
    return triton.jit(kernel)


def theirs(architecture: str) -> list[Result]:
    results = []
    names = {"x": "a_ptr", "x_scale": "scale_a_ptr", "w": "b_ptr", "w_scale": "scale_b_ptr", "bias": "bias_ptr"}
    types = {name: POINTERS[operand] for operand, name in names.items()} | {"c_ptr": POINTERS["out"]}
    types |= dict.fromkeys(("M", "N", "K", "stride_am", "stride_bn", "stride_cm"), "i32")
    stages = DEFAULT_STAGES["gfx" if architecture.startswith("gfx") else "sm"]
    for problems, (block_m, block_n, block_k) in VLLM_TILES:
        # A stride of 1 is a constant to Triton's just-in-time compiler.
        constants = {"stride_ak": 1, "stride_bk": 1, "stride_cn": 1, "ACCUMULATOR_DTYPE": tl.int32}
        constants |= {"BLOCK_SIZE_M": block_m, "BLOCK_SIZE_N": block_n, "BLOCK_SIZE_K": block_k}
        constants |= {"BLOCK_SIZE_SCALE_A": block_m, "BLOCK_SIZE_SCALE_B": block_n, "USE_TD": False, "B_T": True}
        code = compiled(vllm_kernel(), architecture, types, constants, DEFAULT_WARPS, stages, {})
        blocks = (block_m, block_n, block_k)
        results.append(result("vllm", architecture, problems, blocks, DEFAULT_WARPS, stages, code))
    return results


def compiled(
    kernel: Any,
    architecture: str,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    stages: int,
    options: dict[str, object],
) -> MachineCode:
    aligned = tuple(name for name in types if name != "M")
    options = {"num_warps": warps, "num_stages": stages, **options}
    return compile_ahead(kernel, architecture, types, constants, aligned, options)


def result(
    contestant: str,
    architecture: str,
    problems: str,
    blocks: tuple[int, int, int],
    warps: int,
    stages: int,
    code: MachineCode,
) -> Result:
    tile = f"{'x'.join(map(str, blocks))}, {warps} warps, {stages} stages"
    occupancy = round(code.occupancy(architecture, warps), 3)
    return Result(contestant, architecture, problems, tile, code.registers, code.spills, code.shared, occupancy)


def compare(contest: Callable[[str], Iterable[Result]], description: str, name: str) -> None:
    """Run a comparison from the command line: print each result, write all to `benchmarks/results/NAME.json`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--architecture", nargs="+", default=list(packaged()), choices=packaged())
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / f"{name}.json")
    arguments = parser.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for architecture in arguments.architecture:
            for each in contest(architecture):
                results.append(each)
                print(
                    f"{each.architecture:8} {each.contestant:19} {each.tile:33} {each.registers:4} registers "
                    f"{each.spills:4} spills {each.shared:7} B shared {each.occupancy:6.1%}  {each.problems}",
                    flush=True,
                )
    report = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: installed(name) for name in ("vllm-gemma4q", "triton", "vllm")},
        "results": [vars(each) for each in results],
    }
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def installed(name: str) -> str:
    """Version of a distribution; vLLM's build for CPUs has a name of its own."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return metadata.version(f"{name}-cpu")


if __name__ == "__main__":
    compare(
        lambda architecture: [*ours(architecture), *theirs(architecture)], __doc__.splitlines()[0], Path(__file__).stem
    )
