"""What EXL3's Triton kernels compile to: registers, spills, shared memory, occupancy, instructions a weight.

    .venv/bin/python benchmarks/exl3_machine_code.py [--architecture gfx1100 ..]

No GPU is needed: kernels are compiled ahead of time, as they are launched, for every K. Columns as in
`int8_machine_code.py`; beside them how many instructions stand for each weight that a thread decodes in one step of the
loop, everything else in the kernel included: an upper bound. Nobody else's kernel is here: ExLlamaV3's is CUDA C++.

Contestants: decoding and multiplying up to 8 rows (one group) and 16 (two), and the dense block. Results go to
benchmarks/results/.
"""

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "numerics")]

import exl3_compiled as kernels  # noqa: E402
from int8_machine_code import installed  # noqa: E402
from machine_code import MachineCode  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_90", "gfx1100", "gfx1201")
# 64 weights a thread in the fused kernel, 128 x 128 of a block over its threads in the other.
FUSED_WEIGHTS, BLOCK_WEIGHTS = 64, 128 * 128
# Codebooks cost alike but for mul1, which has the half rates: every K once, and those.
FORMATS = [(codebook, width) for codebook, width in kernels.FORMATS if codebook == "mcg" or width % 16]


@dataclass(frozen=True)
class Result:
    """One kernel at one K on one architecture."""

    kernel: str
    architecture: str
    codebook: str
    bits: float
    registers: int
    spills: int
    shared: int
    occupancy: float
    instructions_a_weight: float


def results(architecture: str) -> Iterator[Result]:
    """Of one architecture."""
    for codebook, width in FORMATS:
        for two_groups in (False, True):
            code = kernels.multiply(architecture, codebook, width, two_groups=two_groups)
            name = f"multiply, {16 if two_groups else 8} rows"
            yield result(name, architecture, codebook, width, code, kernels.TILES, FUSED_WEIGHTS)
        code = kernels.reconstruct(architecture, codebook, width)
        weights = BLOCK_WEIGHTS // (32 * kernels.NUM_WARPS)
        yield result("reconstruct", architecture, codebook, width, code, kernels.NUM_WARPS, weights)


def result(
    name: str, architecture: str, codebook: str, width: int, code: MachineCode, warps: int, weights: int
) -> Result:
    occupancy = round(code.occupancy(architecture, warps), 3)
    each = round(instructions(code) / weights, 1)
    bits = width / 16
    return Result(name, architecture, codebook, bits, code.registers, code.spills, code.shared, occupancy, each)


def instructions(code: MachineCode) -> int:
    """Vector and scalar instructions; what pads the code is not counted."""
    nvidia = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?(?!NOP|BRA)[A-Z]", code.text)
    return len(nvidia) or len(re.findall(r"^\s+(?:v|s|ds|global|buffer)_(?!nop|endpgm|waitcnt)\w+", code.text, re.M))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    name = f"{Path(__file__).stem}.json"
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / name)
    arguments = parser.parse_args()
    found: list[Result] = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for architecture in arguments.architecture:
            for each in results(architecture):
                found.append(each)
                print(
                    f"{each.architecture:8} {each.kernel:18} {each.codebook:5} {each.bits:3} "
                    f"{each.registers:4} registers {each.spills:3} spills {each.shared:6} B shared "
                    f"{each.occupancy:6.1%} {each.instructions_a_weight:5} instructions a weight",
                    flush=True,
                )
    report = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: installed(name) for name in ("vllm-gemma4q", "triton")},
        "results": [vars(each) for each in found],
    }
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
