"""Compile a Triton kernel ahead of time, without a GPU or a driver, and read what its machine code contains.

Occupancy is an estimate from registers and shared memory alone. Sources: CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability"; LLVM's AMDGPU subtarget (1536 vector registers a SIMD in steps of 24, wave32).
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Unit:
    """What the programs resident on one SM, or on one WGP (two CUs that share LDS), divide among them.

    registers: 32-bit registers a lane, of all SIMDs together. step: multiple in which a warp gets them. shared: bytes.
    overhead: bytes of shared memory that a program takes beside its own. largest: bytes that one program may have.
    """

    registers: int
    step: int
    warps: int
    shared: int
    overhead: int
    largest: int


SIMDS = 4  # of an SM, where they are called partitions, and of a WGP
_RDNA = Unit(registers=4 * 1536, step=24, warps=4 * 16, shared=128 << 10, overhead=0, largest=64 << 10)
UNITS = {
    "sm_80": Unit(registers=2048, step=8, warps=64, shared=164 << 10, overhead=1 << 10, largest=163 << 10),
    "sm_89": Unit(registers=2048, step=8, warps=48, shared=100 << 10, overhead=1 << 10, largest=99 << 10),
    "sm_90": Unit(registers=2048, step=8, warps=64, shared=228 << 10, overhead=1 << 10, largest=227 << 10),
    "gfx1100": _RDNA,
    "gfx1101": _RDNA,
    "gfx1201": _RDNA,
}


@dataclass(frozen=True)
class MachineCode:
    """Registers, spills and the instructions of one compiled kernel.

    spills: spilled registers on AMD, local-memory instructions on NVIDIA. shared: bytes of LDS or shared memory.
    """

    text: str
    registers: int
    spills: int
    shared: int

    def count(self, pattern: str) -> int:
        """Instructions that match a regular expression."""
        return len(re.findall(pattern, self.text))

    def occupancy(self, architecture: str, num_warps: int) -> float:
        """Estimated share of the warps that a unit can hold which are resident, 0 where not even one program fits."""
        unit = UNITS[architecture]
        per_warp = -(-self.registers // unit.step) * unit.step
        by_registers = SIMDS * (unit.registers // SIMDS // per_warp) // num_warps  # a warp's are all in one SIMD
        by_shared = unit.shared // (self.shared + unit.overhead) if self.shared + unit.overhead else unit.warps
        fits = self.shared <= unit.largest
        return min(by_registers, by_shared, unit.warps // num_warps) * num_warps / unit.warps if fits else 0.0


def compile_ahead(
    kernel: Any,
    architecture: str,
    types: dict[str, str],
    constants: dict[str, object],
    aligned: tuple[str, ...],
    options: dict[str, object],
) -> MachineCode:
    """Compile for `sm_90`, `gfx1100`, ...

    Args:
        types: Triton type of each argument that is not a constant, such as `*i8`.
        aligned: arguments that are multiples of 16, as the just-in-time compiler would find.
        options: num_warps, num_stages, ...
    """
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 32) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
    return _read_amd(compiled) if amd else _read_nvidia(compiled)


def _read_amd(compiled: Any) -> MachineCode:
    text = compiled.asm["amdgcn"]
    registers, spills = (
        int(re.search(rf"\.{field}:\s+(\d+)", text)[1])  # type: ignore[index]
        for field in ("vgpr_count", "vgpr_spill_count")
    )
    return MachineCode(text, registers, spills, compiled.metadata.shared)


def _read_nvidia(compiled: Any) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, text = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    return MachineCode(text, registers, len(re.findall(r"\b(?:STL|LDL)\b", text)), compiled.metadata.shared)
