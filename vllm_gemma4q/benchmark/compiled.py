"""What a tile compiles to, without launching it: registers that spill, shared memory. Needs no GPU.

Spills of AMD code are in its metadata; of NVIDIA's code cuobjdump tells, which Triton's wheels bring. Where it is
missing they are unknown and None.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from gemma4q_kernels.grouped_mm.triton import grouped_mm_kernel
from gemma4q_kernels.int8_scaled_mm.tiles import Tile
from gemma4q_kernels.int8_scaled_mm.triton import scaled_mm_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import OutOfResources, PTXASError

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_OPERANDS = {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "w_ptr": "*i8", "w_scale_ptr": "*fp32", "out_ptr": "*bf16"}
_SIZES = dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn"), "i32")
_DENSE = {**_OPERANDS, "bias_ptr": "*bf16", **_SIZES}
_GROUPED = {**_OPERANDS, "weights_ptr": "*fp32", **_SIZES, "num_blocks": "i32", "stride_we": "i32"}
_GROUPED |= dict.fromkeys(("pairs_ptr", "block_experts_ptr", "block_rows_ptr"), "*i32")
del _GROUPED["M"]
_UNALIGNED = ("M", "num_blocks")
_TOP_K = 8


@dataclass(frozen=True)
class Compiled:
    """spills: registers (AMD) or bytes of stack (NVIDIA) a thread, None where unknown; shared: bytes a program."""

    spills: int | None
    shared: int

    def fits(self, shared_limit: int) -> bool:
        """Whether it is worth timing."""
        return not self.spills and self.shared <= shared_limit


@cache
def compiled(tile: Tile, target: GPUTarget, grouped: bool) -> Compiled | None:
    """The tile's kernel for one architecture, as for sizes in multiples of 16; None where it does not compile."""
    kernel = grouped_mm_kernel if grouped else scaled_mm_kernel
    constants: dict[str, Any] = {"EVEN_K": True, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    constants |= {"BLOCK_K": tile.block_k, "GROUP_M": tile.group_m}
    constants |= {"PAIRS_A_ROW": _TOP_K, "WEIGHTED": False} if grouped else {"HAS_BIAS": False, "SPLIT_K": 1}
    types = _GROUPED if grouped else _DENSE
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if name in types and name not in _UNALIGNED
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False}
    try:
        code = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
    except (OutOfResources, PTXASError):
        return None
    return Compiled(_spills(code), code.metadata.shared)


def _spills(code: Any) -> int | None:
    if "amdgcn" in code.asm:
        found = re.search(r"\.vgpr_spill_count:\s+(\d+)", code.asm["amdgcn"])
        return int(found[1]) if found else None
    if not _CUOBJDUMP.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        command = [str(_CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"STACK:(\d+)", usage)
    return int(found[1]) if found else None
