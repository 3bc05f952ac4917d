"""EXL3 linear of few rows in Triton: weights are decoded in registers and multiplied at once, never written.

    rotate     x [M, in] -> (x * suh) H by blocks of 128 inputs, as two float16 numbers each and a scale a block
    multiply   decodes 128 inputs x 16 TILES outputs at a time -> float32 sums [parts of K, M, out]
    finish     adds the parts in order, H, svh, bias, output dtype

Rows come in groups of 8: a matrix instruction takes 16, so 8 rows of a number's upper part and 8 of its remainder cost
what one part would. A block's scale is a power of two, the parts are float16(x / scale) and 2**11 times what is left:
22 bits together, and no activation overflows or vanishes in float16. Products with What are exact, sums are float32.

The order of inputs within a block is free. For NVIDIA each thread decodes just the weights that the 16 x 8 x 16
instruction wants of it (`multiply_kernel`); for AMD weights go through LDS, 16 bytes at a time. Sums are added in a
fixed order, without atomics. No kernel is tuned, timed or synchronized in a call: CUDA graphs capture it.
"""

# Tuples that grow are tuples of unrolled tensors to Triton, and of one length to mypy.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,assignment"
import torch
import triton
import triton.language as tl

from gemma4q_kernels.exl3.triton_decode import butterflies, column_pairs, pack, unpack
from gemma4q_kernels.exl3_layout import BLOCK, TILE

GROUP = 8  # rows
TILES = 4  # of outputs that a program multiplies, one a warp
# Programs that keep a large GPU busy: with fewer, K is divided. A constant, so that all GPUs add up alike.
PROGRAMS = 1024
ROW_WARPS = 2  # a thread holds 16 of 8 x 128 values


@triton.jit
def _transformed(x):
    """The transform of each row: float32 [8, 128] to the same as [8 rows of tiles, 16 rows of a tile, 8]."""
    x = tl.reshape(tl.permute(tl.reshape(x, (8, 8, 16)), (2, 1, 0)), (16, 64))
    x = pack(butterflies(unpack(x, 4), 16, 4), 4)
    x = tl.reshape(tl.permute(tl.reshape(x, (16, 8, 8)), (1, 0, 2)), (8, 128))
    return tl.reshape(pack(butterflies(unpack(x, 3), 8, 3), 3), (8, 16, 8))


@triton.jit(do_not_specialize=("M",))
def rotate_kernel(x_ptr, suh_ptr, rotated_ptr, scale_ptr, M, stride_x, WAVES: tl.constexpr):
    """One block of inputs of 8 rows. Grid [blocks of inputs, groups].

    rotated: float16 [blocks, groups, 16, 128], rows of zeros beyond M. scale: float32 [blocks, groups, 16].
    """
    block, group = tl.program_id(0), tl.program_id(1)
    local = tl.arange(0, 8)
    rows, columns = group * 8 + local, block * 128 + tl.arange(0, 128)
    suh = tl.load(suh_ptr + columns).to(tl.float32) * 0.0078125
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride_x + columns[None, :], mask=rows[:, None] < M, other=0.0)
    x = _transformed(x.to(tl.float32) * suh[None, :])
    # In the order that `multiply_kernel` decodes weights in.
    x = tl.permute(x, (2, 0, 1)) if WAVES else tl.permute(tl.reshape(x, (2, 4, 4, 2, 2, 8)), (5, 0, 2, 3, 1, 4))
    x = tl.reshape(x, (8, 128))
    # As integers, magnitudes order like the floats they encode; NaN stays NaN whatever the scale.
    largest = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=1)
    exponent = tl.minimum(tl.maximum(largest >> 23, 12), 253)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    x = x * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    upper = x.to(tl.float16)
    rest = ((x - upper.to(tl.float32)) * 2048.0).to(tl.float16)
    first = (block * tl.num_programs(1) + group) * 16
    target = rotated_ptr + first.to(tl.int64) * 128 + local[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(target, upper)
    tl.store(target + 8 * 128, rest)
    tl.store(scale_ptr + first + local, scale)
    tl.store(scale_ptr + first + local + 8, scale * 0.00048828125)


@triton.jit
def _add_product(sums, rotated_ptr, scale_ptr, first, weights):
    """sums + scale * (rows at `first` @ weights): float32 [16, N]."""
    rows = tl.arange(0, 16)
    x = tl.load(rotated_ptr + first.to(tl.int64) * 128 + rows[:, None] * 128 + tl.arange(0, 128)[None, :])
    return sums + tl.dot(x, weights) * tl.load(scale_ptr + first + rows)[:, None]


@triton.jit
def _store_sums(sums_ptr, sums, group, columns, M, N):
    """Upper parts and remainders together: float32 [16, ..] to 8 rows."""
    rows = group * 8 + tl.arange(0, 8)
    both = tl.sum(tl.reshape(sums, (2, 8, sums.shape[1])), axis=0)
    tl.store(sums_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :], both, mask=rows[:, None] < M)


@triton.jit
def _in_fragments(pairs, TILES: tl.constexpr):
    """For NVIDIA: inputs by bits (tile row's upper, row's 3 and 2, 1, tile row's lower, row's 0) x [half, tile, 8]."""
    # (half of a tile's columns, row's bits 3 and 2, 1, 0, tile row's upper bit, tile, column, tile row's lower bits)
    weights = tl.reshape(pack(pairs, 5), (2, 4, 2, 2, 2, TILES, 8, 4))
    return tl.reshape(tl.permute(weights, (4, 1, 2, 7, 3, 0, 5, 6)), (128, 16 * TILES))


@triton.jit
def _in_waves(pairs, TILES: tl.constexpr):
    """For AMD: everything in its natural order, rows of a tile being what a thread holds in neighbouring registers."""
    reversed_bits = ()
    for i in tl.static_range(32):
        reversed_bits += (pairs[(i & 1) * 16 + (i >> 1 & 1) * 8 + (i >> 2 & 1) * 4 + (i >> 3 & 1) * 2 + (i >> 4)],)
    weights = tl.reshape(pack(reversed_bits, 5), (2, 2, 2, 2, 2, 2, TILES, 8, 4))
    return tl.reshape(tl.permute(weights, (5, 8, 3, 2, 1, 0, 6, 4, 7)), (128, 16 * TILES))


@triton.jit(do_not_specialize=("M", "groups", "blocks", "blocks_a_part"))
def multiply_kernel(
    rotated_ptr,
    scale_ptr,
    words_ptr,
    sums_ptr,
    M,
    N,
    groups,
    tiles_a_row,
    blocks,
    blocks_a_part,
    WIDTH: tl.constexpr,
    CODEBOOK: tl.constexpr,
    WAVES: tl.constexpr,
    TWO_GROUPS: tl.constexpr,
    TILES: tl.constexpr,
):
    """TILES * 16 outputs of one or two groups of rows, over a part of K. Grid [N / (16 TILES), parts, row groups].

    A thread of NVIDIA's instruction holds weights of one column in places 2q, 2q + 1, 2q + 8 and 2q + 9 of 16, where q
    is its number in four. Here it decodes rows 4i .. 4i + 3 of a tile, for instruction i, and its four neighbours hold
    four tiles below each other. So nothing is exchanged there.
    """
    part, group = tl.program_id(1), tl.program_id(2) * (2 if TWO_GROUPS else 1)
    # [2, TILES, 8 pairs of columns, 4]: the first and last axis number the 8 rows of tiles.
    index = tl.arange(0, 64 * TILES)
    tile_row = (index // (32 * TILES)) * 4 + (index & 3)
    tile = tile_row * tiles_a_row + tl.program_id(0) * TILES + (index >> 5) % TILES
    start = part * blocks_a_part
    stop = tl.minimum(start + blocks_a_part, blocks)
    tile_ptr = words_ptr + (start.to(tl.int64) * 8 * tiles_a_row) * (WIDTH // 2) + tile * (WIDTH // 2)
    sums = tl.zeros((16, 16 * TILES), dtype=tl.float32)
    more = tl.zeros((16, 16 * TILES), dtype=tl.float32)
    for block in range(start, stop):
        pairs = column_pairs(tile_ptr, (index >> 2) & 7, WIDTH, CODEBOOK)
        weights = _in_waves(pairs, TILES) if WAVES else _in_fragments(pairs, TILES)
        first = (block * groups + group) * 16
        sums = _add_product(sums, rotated_ptr, scale_ptr, first, weights)
        if TWO_GROUPS:
            more = _add_product(more, rotated_ptr, scale_ptr, first + 16, weights)
        tile_ptr += 8 * tiles_a_row * (WIDTH // 2)
    columns = tl.arange(0, 16 * TILES)
    if not WAVES:  # [half, tile, column]
        columns = ((columns >> 3) % TILES) * 16 + columns // (8 * TILES) * 8 + (columns & 7)
    columns += tl.program_id(0) * (16 * TILES)
    sums_ptr += part.to(tl.int64) * M * N
    _store_sums(sums_ptr, sums, group, columns, M, N)
    if TWO_GROUPS:
        _store_sums(sums_ptr, more, group + 1, columns, M, N)


@triton.jit(do_not_specialize=("M", "parts"))
def finish_kernel(sums_ptr, svh_ptr, bias_ptr, out_ptr, M, N, parts, stride_out, HAS_BIAS: tl.constexpr):
    """One block of outputs of 8 rows: the sum of float32 [parts, M, N], H, svh, bias. Grid [N / 128, groups]."""
    block = tl.program_id(0)
    rows = tl.program_id(1) * 8 + tl.arange(0, 8)
    columns = block * 128 + tl.arange(0, 128)
    inside = rows[:, None] < M
    source = sums_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    total = tl.zeros((8, 128), dtype=tl.float32)
    for _ in range(parts):
        total += tl.load(source, mask=inside, other=0.0)
        source += M.to(tl.int64) * N
    total = tl.reshape(tl.permute(_transformed(total), (2, 0, 1)), (8, 128))
    out = total * tl.load(svh_ptr + columns).to(tl.float32)[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    target = out_ptr + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=inside)


def parts_of(blocks: int, columns: int, row_groups: int) -> tuple[int, int]:
    """How many parts `blocks` of inputs are divided into, none of them empty, and how many blocks make a part."""
    programs = columns // (TILE * TILES) * row_groups
    each = triton.cdiv(blocks, min(blocks, triton.cdiv(PROGRAMS, programs)))
    return triton.cdiv(blocks, each), each


def stages(waves: bool) -> int:
    """Steps whose words are on their way at a time. On AMD a second one would take a quarter of the waves."""
    return 1 if waves else 3


def multiply(
    x: torch.Tensor,
    words: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    codebook: str,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    waves: bool = torch.version.hip is not None,
) -> None:
    """Write x @ W + bias to `out`.

    Args:
        x: float [M, in] with unit stride along inputs, M at least 1.
        words: int32 [in/16, out/16, 8 K], see `words_of`.
        suh, svh: float16 [in], [out].
        out: float [M, out] with unit stride along outputs.
        waves: order inputs and weights for AMD's matrix instruction instead of NVIDIA's. Both are right on any device.
    """
    (m, k), n, width = x.shape, TILE * words.shape[1], words.shape[2]
    blocks, two = k // BLOCK, m > GROUP
    row_groups = triton.cdiv(m, 2 * GROUP if two else GROUP)
    groups = row_groups * (2 if two else 1)
    parts, each = parts_of(blocks, n, row_groups)
    rotated = torch.empty((blocks, groups, 2 * GROUP, BLOCK), dtype=torch.float16, device=x.device)
    scale = torch.empty((blocks, groups, 2 * GROUP), dtype=torch.float32, device=x.device)
    sums = torch.empty((parts, m, n), dtype=torch.float32, device=x.device)
    common = {"WAVES": waves, "enable_fp_fusion": False}
    rotate_kernel[(blocks, groups)](x, suh, rotated, scale, m, x.stride(0), num_warps=ROW_WARPS, **common)
    multiply_kernel[(n // (TILE * TILES), parts, row_groups)](
        rotated,
        scale,
        words,
        sums,
        m,
        n,
        groups,
        words.stride(0) // width,
        blocks,
        each,
        WIDTH=2 * width,
        CODEBOOK=codebook,
        TWO_GROUPS=two,
        TILES=TILES,
        num_warps=TILES,
        num_stages=stages(waves),
        **common,
    )
    finish_kernel[(n // BLOCK, triton.cdiv(m, GROUP))](
        sums,
        svh,
        out if bias is None else bias,  # never read without one, but Triton needs a pointer
        out,
        m,
        n,
        parts,
        out.stride(0),
        HAS_BIAS=bias is not None,
        num_warps=ROW_WARPS,
        enable_fp_fusion=False,
    )
