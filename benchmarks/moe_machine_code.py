"""What our INT8 experts' tiles and vLLM's compile to: registers, spills, shared memory, estimated occupancy.

    .venv/bin/python benchmarks/moe_machine_code.py [--architecture gfx1100 ..]

No GPU is needed: both kernels are compiled ahead of time by the same Triton, with the same alignment and types, for the
shapes of Gemma 4 26B-A4B (w13: K = 2816, w2: K = 704). Contestants:

- gemma4q: every row of the tile tables that `gemma4q_kernels.grouped_mm` launches from;
- vllm:    `fused_moe_kernel`, source unchanged, as int8 per token and channel, with all tiles of vLLM's defaults for
           models without a tuned configuration;
- vllm with our tile: the same kernel with our rows, so that nothing but the kernel differs.

What the figures mean, and what they do not: see `int8_machine_code.py`. Results go to benchmarks/results/.
"""

from pathlib import Path
from typing import Any

import triton
from gemma4q_kernels.grouped_mm.tiles import table
from gemma4q_kernels.grouped_mm.triton import grouped_mm_kernel
from gemma4q_kernels.int8_scaled_mm.tiles import Tile
from int8_machine_code import Result, compare, result
from machine_code import compile_ahead
from triton import language as tl

# The defaults of vLLM 0.32's get_default_config: (tokens that they are for, block sizes, warps, stages but on ROCm).
VLLM_TILES = (
    ("T <= 32", (16, 64, 128), 4, 4),
    ("T <= 64", (32, 64, 128), 4, 3),
    ("T <= 96", (32, 128, 64), 4, 3),
    ("T <= 128", (64, 128, 64), 4, 3),
    ("T <= 512", (64, 128, 64), 8, 3),
    ("T > 512", (128, 128, 64), 8, 3),
)
STAGES_ROCM = 2
TOP_K = 8
W13_K, W2_K = 2816, 704


def ours(architecture: str, tile: Tile, k: int, contestant: str, problems: str) -> Result:
    types = {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "w_ptr": "*i8", "w_scale_ptr": "*fp32", "weights_ptr": "*fp32"}
    types |= {"out_ptr": "*bf16"} | dict.fromkeys(("pairs_ptr", "block_experts_ptr", "block_rows_ptr"), "*i32")
    types |= dict.fromkeys(("num_blocks", "N", "K", "stride_xm", "stride_we", "stride_wn"), "i32")
    constants = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m}
    constants |= {"PAIRS_A_ROW": TOP_K if k == W13_K else 1, "WEIGHTED": k == W2_K, "EVEN_K": k % tile.block_k == 0}
    options = {"enable_fp_fusion": False}
    return compiled(grouped_mm_kernel, architecture, types, constants, tile, k, contestant, problems, options)


def vllm_kernel() -> Any:
    """vLLM's kernel, as installed. Without a GPU vLLM puts a stand-in where Triton would be, which is undone here."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    kernel = fused_moe.fused_moe_kernel
    if isinstance(kernel, triton.JITFunction):
        return kernel
    fused_moe.tl = tl
    if not isinstance(fused_moe.write_zeros_to_output, triton.JITFunction):
        fused_moe.write_zeros_to_output = triton.jit(fused_moe.write_zeros_to_output)
    return triton.jit(kernel)


def theirs(architecture: str, tile: Tile, k: int, contestant: str, problems: str) -> Result:
    types = {"a_ptr": "*i8", "b_ptr": "*i8", "c_ptr": "*bf16", "a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32"}
    types |= {"topk_weights_ptr": "*fp32"}
    types |= dict.fromkeys(("sorted_token_ids_ptr", "expert_ids_ptr", "num_tokens_post_padded_ptr"), "*i32")
    strides = ("stride_am", "stride_cm", *(f"stride_b{suffix}" for suffix in ("e", "n", "se", "be", "bn")))
    types |= dict.fromkeys(("N", "K", "EM", "num_valid_tokens", *strides), "i32")
    # A stride of 1 is a constant to Triton's just-in-time compiler, and so is an absent bias.
    names = ("ak", "bk", "cn", "asm", "ask", "bsk", "bsn")
    constants: dict[str, Any] = dict.fromkeys((f"stride_{name}" for name in names), 1) | {"b_bias_ptr": None}
    constants |= {"BLOCK_SIZE_M": tile.block_m, "BLOCK_SIZE_N": tile.block_n, "BLOCK_SIZE_K": tile.block_k}
    constants |= {"GROUP_SIZE_M": tile.group_m, "SPLIT_K": 1, "group_n": 0, "group_k": 0}
    constants |= {"MUL_ROUTED_WEIGHT": k == W2_K, "top_k": TOP_K if k == W13_K else 1, "compute_type": tl.bfloat16}
    constants |= {"use_int8_w8a8": True, "per_channel_quant": True}
    off = ("naive_block_assignment", "use_fp8_w8a8", "use_int8_w8a16", "HAS_BIAS", "SWAP_AB", "USE_TD")
    constants |= dict.fromkeys(off, False)
    return compiled(vllm_kernel(), architecture, types, constants, tile, k, contestant, problems, {})


def compiled(
    kernel: Any,
    architecture: str,
    types: dict[str, str],
    constants: dict[str, Any],
    tile: Tile,
    k: int,
    contestant: str,
    problems: str,
    options: dict[str, object],
) -> Result:
    aligned = tuple(name for name in types if name not in ("num_blocks", "num_valid_tokens"))
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **options}
    code = compile_ahead(kernel, architecture, types, constants, aligned, options)
    blocks = (tile.block_m, tile.block_n, tile.block_k)
    name = "w13" if k == W13_K else "w2"
    return result(contestant, architecture, f"{name}, {problems}", blocks, tile.num_warps, tile.num_stages, code)


def contest(architecture: str) -> list[Result]:
    """All contestants on one architecture."""
    results = []
    rows = table(architecture).rows
    for row in rows:
        problems = f"pairs an expert <= {row.max_m}" if row.max_m else "all larger"
        shared = not any(other.max_k for other in rows if other.max_m == row.max_m)
        for k in (W2_K,) if row.max_k else (W13_K, W2_K) if shared else (W13_K,):
            results.append(ours(architecture, row.tile, k, "gemma4q", problems))
            results.append(theirs(architecture, row.tile, k, "vllm with our tile", problems))
    for problems, (block_m, block_n, block_k), warps, stages in VLLM_TILES:
        stages = STAGES_ROCM if architecture.startswith("gfx") else stages
        tile = Tile(block_m=block_m, block_n=block_n, block_k=block_k, num_warps=warps, num_stages=stages, group_m=1)
        results += [theirs(architecture, tile, k, "vllm", problems) for k in (W13_K, W2_K)]
    return results


if __name__ == "__main__":
    compare(contest, __doc__.splitlines()[0], Path(__file__).stem)
