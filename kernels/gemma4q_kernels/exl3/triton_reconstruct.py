"""Dense EXL3 weights in Triton: one program decodes a block of 128 x 128, transforms it along in and along out in the
order of `hadamard.transform`, scales it and writes it, once. The bits are the reference's: float32 additions in the
same order, no fused multiply-add.

The block stays in registers. Threads exchange it three times, each time for the next three or four stages, and a fourth
time for stores of whole rows.
"""

# Tuples that grow are tuples of unrolled tensors to Triton, and of one length to mypy.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,assignment"
import torch
import triton
import triton.language as tl

from gemma4q_kernels.exl3.triton_decode import butterflies, column_pairs, pack, unpack

# 32 weights a thread: with half the warps, twice the registers and a quarter of an SM's warps.
NUM_WARPS = 16


@triton.jit
def _transform_next(x, BITS: tl.constexpr, NEXT: tl.constexpr, SHAPE: tl.constexpr, ORDER: tl.constexpr):
    """Exchange a tuple of 2 ** BITS tensors for one of 2 ** NEXT: what `ORDER` puts first, which is transformed."""
    size: tl.constexpr = 128 * 128 >> NEXT
    exchanged = tl.reshape(tl.permute(tl.reshape(pack(x, BITS), SHAPE), ORDER), (1 << NEXT, size))
    return butterflies(unpack(exchanged, NEXT), 1 << NEXT, NEXT)


@triton.jit
def reconstruct_kernel(
    words_ptr,
    suh_ptr,
    svh_ptr,
    out_ptr,
    tiles_a_row,
    stride_out,
    WIDTH: tl.constexpr,
    CODEBOOK: tl.constexpr,
):
    """Block (program 1, program 0) of a weight, whose rows of tiles lie `tiles_a_row` tiles apart."""
    block_k, block_n = tl.program_id(1).to(tl.int64), tl.program_id(0)
    # [8 rows of tiles, 8 tiles, 8 pairs of columns]: 8 neighbouring threads read one tile.
    index = tl.arange(0, 512)
    tile = (index >> 6) * tiles_a_row + ((index >> 3) & 7)
    tile_ptr = words_ptr + (block_k * 8 * tiles_a_row + block_n * 8) * (WIDTH // 2) + tile * (WIDTH // 2)
    pairs = column_pairs(tile_ptr, index & 7, WIDTH, CODEBOOK)
    x = ()
    for i in tl.static_range(32):
        x += (pairs[i].to(tl.float32),)
    x = butterflies(x, 32, 4)
    # In names of axes: (half of a tile's columns, row, tile row, tile, column) to (tile row, half, row, tile, column),
    x = _transform_next(x, 5, 3, (32, 8, 64), (1, 0, 2))
    # to (half, column, tile row, row, tile),
    x = _transform_next(x, 3, 4, (8, 2, 16, 8, 8), (1, 4, 0, 2, 3))
    # to (tile, tile row, row, half, column).
    x = _transform_next(x, 4, 3, (16, 128, 8), (2, 1, 0))
    dense = tl.reshape(tl.permute(tl.reshape(pack(x, 3), (8, 128, 16)), (1, 0, 2)), (128, 128))
    rows, columns = block_k * 128 + tl.arange(0, 128), block_n * 128 + tl.arange(0, 128)
    suh = tl.load(suh_ptr + rows).to(tl.float32) * 0.0078125
    svh = tl.load(svh_ptr + columns).to(tl.float32)
    dense = (dense * suh[:, None]) * svh[None, :]
    tl.store(out_ptr + rows[:, None] * stride_out + columns[None, :], dense.to(out_ptr.dtype.element_ty))


def words_of(trellis: torch.Tensor) -> torch.Tensor:
    """Words of the ring: int16 [in/16, out/16, 16 K] to contiguous int32 [in/16, out/16, 8 K], a view if possible."""
    trellis = trellis.contiguous()
    return (trellis if trellis.data_ptr() % 4 == 0 else trellis.clone()).view(torch.int32)


def reconstruct_columns(
    words: torch.Tensor, suh: torch.Tensor, svh: torch.Tensor, codebook: str, out: torch.Tensor
) -> None:
    """Write W[:, columns] to `out`, whole blocks of columns.

    Args:
        words: int32 [in/16, columns/16, 8 K], the slice of `words_of` that holds them.
        suh, svh: float16 [in], [columns].
        out: float [in, columns] with unit stride along columns.
    """
    rows, columns, width = words.shape
    reconstruct_kernel[(columns // 8, rows // 8)](
        words,
        suh,
        svh,
        out,
        words.stride(0) // width,
        out.stride(0),
        WIDTH=2 * width,
        CODEBOOK=codebook,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
