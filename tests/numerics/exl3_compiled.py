"""EXL3's Triton kernels as they are launched, compiled ahead of time: shared by a test and a benchmark."""

from typing import Any

from exl3_weights import FORMATS
from gemma4q_kernels.exl3 import triton_linear, viterbi_triton
from gemma4q_kernels.exl3.packing import step_bits
from gemma4q_kernels.exl3.triton_linear import ROW_WARPS, TILES
from gemma4q_kernels.exl3.triton_reconstruct import NUM_WARPS, reconstruct_kernel
from gemma4q_kernels.exl3.viterbi_triton import STEP_WARPS
from machine_code import MachineCode, compile_ahead

__all__ = ["FORMATS", "NUM_WARPS", "ROW_WARPS", "STEP_WARPS", "TILES"]

UNFUSED: dict[str, Any] = {"enable_fp_fusion": False}


def reconstruct(architecture: str, codebook: str, width: int, num_warps: int = NUM_WARPS) -> MachineCode:
    """A dense block in bfloat16."""
    types = {"words_ptr": "*i32", "suh_ptr": "*fp16", "svh_ptr": "*fp16", "out_ptr": "*bf16"}
    types |= dict.fromkeys(("tiles_a_row", "stride_out"), "i32")
    constants = {"WIDTH": width, "CODEBOOK": codebook}
    aligned = tuple(name for name in types if name != "tiles_a_row")
    options = {"num_warps": num_warps, **UNFUSED}
    return compile_ahead(reconstruct_kernel, architecture, types, constants, aligned, options)


def multiply(
    architecture: str,
    codebook: str,
    width: int,
    *,
    two_groups: bool = False,
    waves: bool | None = None,
    tiles: int = triton_linear.TILES,
) -> MachineCode:
    """Decoding and multiplying; `waves` None: the order that is for this architecture."""
    types = {"rotated_ptr": "*fp16", "scale_ptr": "*fp32", "words_ptr": "*i32", "sums_ptr": "*fp32"}
    types |= dict.fromkeys(("M", "N", "groups", "tiles_a_row", "blocks", "blocks_a_part"), "i32")
    waves = architecture.startswith("gfx") if waves is None else waves
    constants = {"WIDTH": width, "CODEBOOK": codebook, "WAVES": waves, "TWO_GROUPS": two_groups, "TILES": tiles}
    aligned = ("rotated_ptr", "scale_ptr", "words_ptr", "sums_ptr", "N")
    options = {"num_warps": tiles, "num_stages": triton_linear.stages(waves), **UNFUSED}
    return compile_ahead(triton_linear.multiply_kernel, architecture, types, constants, aligned, options)


def rotate(architecture: str) -> MachineCode:
    """Activations in bfloat16."""
    types = {"x_ptr": "*bf16", "suh_ptr": "*fp16", "rotated_ptr": "*fp16", "scale_ptr": "*fp32"}
    types |= {"M": "i32", "stride_x": "i32"}
    aligned = tuple(name for name in types if name != "M")
    options = {"num_warps": triton_linear.ROW_WARPS, **UNFUSED}
    constants = {"WAVES": architecture.startswith("gfx")}
    return compile_ahead(triton_linear.rotate_kernel, architecture, types, constants, aligned, options)


def finish(architecture: str) -> MachineCode:
    """To bfloat16, with a bias."""
    types = {"sums_ptr": "*fp32", "svh_ptr": "*fp16", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    types |= dict.fromkeys(("M", "N", "parts", "stride_out"), "i32")
    aligned = tuple(name for name in types if name not in ("M", "parts"))
    options = {"num_warps": triton_linear.ROW_WARPS, **UNFUSED}
    return compile_ahead(triton_linear.finish_kernel, architecture, types, {"HAS_BIAS": True}, aligned, options)


def search_step(architecture: str, codebook: str, width: int) -> MachineCode:
    """A window of the search."""
    types = {"tiles_ptr": "*fp32", "minima_ptr": "*fp32", "next_ptr": "*fp32", "choices_ptr": "*u8"}
    types |= {"count": "i32", "window": "i32"}
    added, leaving = step_bits(width)[:2]
    constants = {"ADDED": added, "LEAVING": leaving, "CODEBOOK": codebook}
    constants |= {"TILES": viterbi_triton.TILES, "BLOCK": viterbi_triton.BLOCK}
    options = {"num_warps": viterbi_triton.STEP_WARPS, **UNFUSED}
    aligned = ("tiles_ptr", "minima_ptr", "next_ptr", "choices_ptr")
    return compile_ahead(viterbi_triton.step_kernel, architecture, types, constants, aligned, options)


def search_back(architecture: str, width: int) -> MachineCode:
    """The way back of a search."""
    types = {"choices_ptr": "*u8", "ends_ptr": "*i64", "path_ptr": "*i64", "count": "i32", "stride_window": "i64"}
    first, second = step_bits(width)[:2]
    constants = {"FIRST": first, "SECOND": second, "TILES": viterbi_triton.BACK_TILES}
    aligned = ("choices_ptr", "ends_ptr", "path_ptr", "stride_window")
    return compile_ahead(
        viterbi_triton.back_kernel, architecture, types, constants, aligned, {"num_warps": 1, **UNFUSED}
    )
