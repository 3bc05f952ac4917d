"""`viterbi.search` on GPUs: a launch for each window, over all tiles and all values of the bits that are kept.

A program takes TILES tiles and BLOCK values of the lower bits that go on. For each value of the highest bits, which do
not, it computes the codebook once for all its tiles and adds a squared error to the minimum that leads there: read once
for all states that differ in the bits the window adds. Which of the candidates won is one byte, and the way back reads
256 of them a tile. Launches order the windows, so that nothing rests on a GPU's memory model.

The same float32 operations as `viterbi.py`, unfused, and of equal candidates the first: the same states, but where the
last window of the first pass has several equal minima.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gemma4q_kernels.exl3.packing import WINDOWS, step_bits
from gemma4q_kernels.exl3.triton_decode import codebook_value
from gemma4q_kernels.exl3.viterbi import STATES

TILES = 4
BLOCK = 256
STEP_WARPS = 4
BACK_TILES = 32
# Bytes of `choices` at a time.
CHOICES_BYTES = 1 << 30


@triton.jit(do_not_specialize=("count", "window"))
def step_kernel(
    tiles_ptr,
    minima_ptr,
    next_ptr,
    choices_ptr,
    count,
    window,
    ADDED: tl.constexpr,
    LEAVING: tl.constexpr,
    CODEBOOK: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One window: float32 [count, 65536 >> ADDED] to float32 and uint8 [count, 65536 >> LEAVING].

    Grid [(65536 >> LEAVING) / BLOCK, tiles / TILES].
    """
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    inside = tile < count
    first = tl.program_id(0) * BLOCK
    # [what leads there, the bits that the window adds]
    before = (first >> ADDED) + tl.arange(0, BLOCK >> ADDED)
    kept = first + (tl.arange(0, BLOCK >> ADDED)[:, None] << ADDED) + tl.arange(0, 1 << ADDED)[None, :]
    target = tl.load(tiles_ptr + tile * 256 + window, mask=inside, other=0.0)[:, None, None]
    minima = minima_ptr + tile.to(tl.int64)[:, None] * (65536 >> ADDED) + before[None, :]
    best = tl.full((TILES, BLOCK >> ADDED, 1 << ADDED), float("inf"), dtype=tl.float32)
    choice = tl.zeros((TILES, BLOCK >> ADDED, 1 << ADDED), dtype=tl.int32)
    for highest in range(1 << LEAVING):
        state = kept + (highest << (16 - LEAVING))
        difference = codebook_value(state.to(tl.uint32), CODEBOOK).to(tl.float32)[None, :, :] - target
        least = tl.load(minima + (highest << (16 - LEAVING - ADDED)), mask=inside[:, None], other=0.0)
        cost = difference * difference + least[:, :, None]
        choice = tl.where(cost < best, highest, choice)
        best = tl.minimum(cost, best)
    offsets = tile.to(tl.int64)[:, None, None] * (65536 >> LEAVING) + kept[None, :, :]
    tl.store(next_ptr + offsets, best, mask=inside[:, None, None])
    tl.store(choices_ptr + offsets, choice.to(tl.uint8), mask=inside[:, None, None])


@triton.jit(do_not_specialize=("count",))
def back_kernel(
    choices_ptr,
    ends_ptr,
    path_ptr,
    count,
    stride_window,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    TILES: tl.constexpr,
):
    """Back from what each ring leaves behind, int64 [count], to states int64 [count, 256]; grid [tiles].

    Even windows add FIRST bits, odd ones SECOND; choices lie `stride_window` apart.
    """
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    inside = tile < count
    stride = stride_window.to(tl.int64)
    kept = tl.load(ends_ptr + tile, mask=inside, other=0)
    for i in range(128):
        odd = 255 - 2 * i
        source = choices_ptr + odd * stride
        highest = tl.load(source + tile.to(tl.int64) * (65536 >> FIRST) + kept, mask=inside, other=0).to(tl.int64)
        state = (highest << (16 - FIRST)) | kept
        tl.store(path_ptr + tile.to(tl.int64) * 256 + odd, state, mask=inside)
        kept = state >> SECOND
        source -= stride
        highest = tl.load(source + tile.to(tl.int64) * (65536 >> SECOND) + kept, mask=inside, other=0).to(tl.int64)
        state = (highest << (16 - SECOND)) | kept
        tl.store(path_ptr + tile.to(tl.int64) * 256 + odd - 1, state, mask=inside)
        kept = state >> FIRST


def search(tiles: torch.Tensor, width: int, codebook: str) -> torch.Tensor:
    """See `viterbi.search`: float32 [T, 256] on a GPU to int64 [T, 256]."""
    bits = step_bits(width)[:2]
    most = max(1, CHOICES_BYTES // choices_bytes(width))
    return torch.cat([_tail_biting(part.contiguous(), bits, codebook) for part in torch.split(tiles, most)])


def choices_bytes(width: int) -> int:
    """What a tile's choices take while it is searched."""
    return WINDOWS * (STATES >> min(step_bits(width)))


def _tail_biting(tiles: torch.Tensor, bits: Sequence[int], codebook: str) -> torch.Tensor:
    half = WINDOWS // 2
    before_first = cheapest_path(tiles.roll(-half, dims=1), bits, codebook, None)[:, half - 1]
    return cheapest_path(tiles, bits, codebook, before_first & ((STATES >> bits[0]) - 1))


def step(
    tiles: torch.Tensor,
    window: int,
    bits: Sequence[int],
    codebook: str,
    minima: torch.Tensor,
    result: torch.Tensor,
    choices: torch.Tensor,
    block: int | None = None,
) -> None:
    """One window of all tiles; see `step_kernel`.

    Args:
        tiles: float32 [T, 256], contiguous.
        bits: how many this window adds, and how many the next one does.
        minima, result: float32 with room for T rows of 65536 >> bits, which lie behind each other.
        choices: uint8, the same for the result's.
        block: values of kept bits that a program takes, from 2 ** bits[0] to 65536 >> bits[1]; None: `BLOCK`.
    """
    count, block = len(tiles), BLOCK if block is None else block
    step_kernel[((STATES >> bits[1]) // block, triton.cdiv(count, TILES))](
        tiles,
        minima,
        result,
        choices,
        count,
        window,
        ADDED=bits[0],
        LEAVING=bits[1],
        CODEBOOK=codebook,
        TILES=TILES,
        BLOCK=block,
        num_warps=STEP_WARPS,
        enable_fp_fusion=False,
    )


def cheapest_path(tiles: torch.Tensor, bits: Sequence[int], codebook: str, ends: torch.Tensor | None) -> torch.Tensor:
    """See `viterbi.cheapest_path`; `bits` are those of even and of odd windows."""
    count, most = len(tiles), STATES >> min(bits)
    first, second = bits
    minima, spare = (torch.empty((count, most), dtype=torch.float32, device=tiles.device) for _ in range(2))
    choices = torch.empty((WINDOWS, count, most), dtype=torch.uint8, device=tiles.device)
    started = minima.view(-1)[: count * (STATES >> first)].view(count, -1)
    if ends is None:
        started.zero_()
    else:
        started.fill_(torch.inf).scatter_(1, ends.unsqueeze(1), 0.0)
    for window in range(WINDOWS):
        turned = (second, first) if window % 2 else (first, second)
        step(tiles, window, turned, codebook, minima, spare, choices[window])
        minima, spare = spare, minima
    kept = started.argmin(dim=1) if ends is None else ends.contiguous()
    return way_back(choices, kept, bits)


def way_back(choices: torch.Tensor, ends: torch.Tensor, bits: Sequence[int]) -> torch.Tensor:
    """The states that choices lead to.

    Args:
        choices: uint8 [256, T, most]; of each window T rows of 65536 >> bits of the next one, which lie behind each
            other.
        ends: int64 [T], what each ring leaves behind.
        bits: what even and odd windows add.

    Returns:
        int64 [T, 256].
    """
    count = len(ends)
    path = torch.empty((count, WINDOWS), dtype=torch.int64, device=choices.device)
    back_kernel[(triton.cdiv(count, BACK_TILES),)](
        choices,
        ends,
        path,
        count,
        choices.stride(0),
        FIRST=bits[0],
        SECOND=bits[1],
        TILES=BACK_TILES,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return path
