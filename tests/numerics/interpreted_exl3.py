"""The EXL3 Triton kernels on CPU tensors; run with TRITON_INTERPRET=1 set before Triton is imported.

Outputs are float32 and float16: the interpreter truncates bfloat16 stores. Prints one line for each case that passed.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from exl3_weights import FORMATS, dense, packed
from gemma4q_kernels.exl3 import Exl3Weight, linear, viterbi, viterbi_triton
from gemma4q_kernels.exl3 import triton as kernels
from gemma4q_kernels.exl3.packing import STATE_BITS, WINDOWS, pack, step_bits
from gemma4q_kernels.exl3.triton_linear import multiply, parts_of
from gemma4q_kernels.exl3.triton_reconstruct import words_of
from tolerances import EXL3_TRITON, rms_error

# Rows and their dtypes: one group of rows, and a second pair of groups.
ROWS = ((1, torch.float32), (18, torch.float16))
# Every K, and every codebook: the one decides where windows lie, the other what they mean.
SOME = [(codebook, width) for codebook, width in FORMATS if codebook == "mul1"] + [("3inst", 48), ("mcg", 64)]
# A step runs through 2 ** K candidates, one after the other: wide ones take long in the interpreter.
STEPS = [("mcg", 16), ("3inst", 48), ("mul1", 24), ("mul1", 40), ("mcg", 128)]
SEARCHED = (("mul1", 56),)  # steps of three and of four bits


def check_dense(codebook: str, width: int) -> None:
    """The bits of the reference, nothing left unwritten."""
    weight = packed(codebook, width)
    assert torch.equal(dense(weight, torch.float32, "triton"), dense(weight, torch.float32, "reference"))


def check_float16() -> None:
    """Rounded once; one flipped bit shows."""
    weight = packed("mul1", 80, 8, 16)
    expected = dense(weight, torch.float16, "reference")
    assert torch.equal(dense(weight, torch.float16, "triton"), expected)
    flipped = weight.trellis.clone()
    flipped[-1, -1, 0] ^= 1
    broken = Exl3Weight(flipped, weight.suh, weight.svh, "mul1")
    assert not torch.equal(dense(broken, torch.float16, "triton"), expected)


def check_layouts() -> None:
    """Slices of larger weights, odd offsets: the same bits."""
    weight = packed("mcg", 48, 16, 24)
    expected = dense(weight, torch.float32, "reference")
    part = Exl3Weight(weight.trellis[8:, 8:16], weight.suh[128:], weight.svh[128:256], "mcg")
    assert torch.equal(dense(part, torch.float32, "triton"), expected[128:, 128:256])
    odd = torch.empty(weight.trellis.numel() + 1, dtype=torch.int16)[1:].view(weight.trellis.shape)
    other = Exl3Weight(odd.copy_(weight.trellis), weight.suh, weight.svh, "mcg")
    assert torch.equal(dense(other, torch.float32, "triton"), expected)


def check_product(codebook: str, width: int) -> None:
    """A format through the fused kernel, in the orders of both vendors by turns."""
    weight, x = packed(codebook, width), torch.randn(2, 128)
    out = torch.empty(2, 128)
    multiply(x, words_of(weight.trellis), weight.suh, weight.svh, codebook, None, out, waves=width % 32 == 0)
    assert rms_error(out, linear(x, [weight], backend="reference")) <= EXL3_TRITON[torch.float32]


def check_orders() -> None:
    """Both orders of inputs, where one flipped bit shows."""
    weight, x = packed("mcg", 64), torch.randn(2, 128)
    expected = linear(x, [weight], backend="reference")
    flipped = weight.trellis.clone()
    flipped[0, 0, -1] ^= 1
    for waves in (False, True):
        for trellis, right in ((weight.trellis, True), (flipped, False)):
            out = torch.empty_like(expected)
            multiply(x, words_of(trellis), weight.suh, weight.svh, "mcg", None, out, waves)
            assert (rms_error(out, expected) <= EXL3_TRITON[torch.float32]) is right


def two_shards() -> list[Exl3Weight]:
    """Of one fused linear, each with its own K, codebook and input vector."""
    return [packed("mcg", 64), packed("mul1", 24)]


def check_linear(rows: int, dtype: torch.dtype) -> None:
    """Any number of rows, twice the same, nothing left unwritten."""
    shards, x, bias = two_shards(), torch.randn(rows, 128).to(dtype), torch.randn(256)
    got = linear(x, shards, bias, backend="triton")
    assert got.dtype == dtype and got.is_contiguous()
    assert rms_error(got, linear(x.float(), shards, bias, backend="reference")) <= EXL3_TRITON[dtype]
    assert torch.equal(got, linear(x.t().contiguous().t(), shards, bias, backend="triton"))


def check_what_is_wrong_shows() -> None:
    """A sign, a scale, the order of shards, the bias."""
    (first, second), x, bias = two_shards(), torch.randn(3, 128), torch.randn(256)
    expected = linear(x, [first, second], bias, backend="reference")
    signs = torch.ones(128).index_fill_(0, torch.tensor([77]), -1).half()
    assert rms_error(linear(x, [first, second], bias * 1.1, backend="triton"), expected) > EXL3_TRITON[torch.float32]
    for broken in (
        [Exl3Weight(first.trellis, first.suh * signs, first.svh, "mcg"), second],
        [Exl3Weight(first.trellis, first.suh, first.svh * signs, "mcg"), second],
        [Exl3Weight(first.trellis, first.suh * 1.1, first.svh, "mcg"), second],
        [second, first],
    ):
        assert rms_error(linear(x, broken, bias, backend="triton"), expected) > EXL3_TRITON[torch.float32]


def check_parts() -> None:
    """Sums of any division of K: nothing lost, blocks of inputs in their places; the shapes of the 31B are divided."""
    assert parts_of(42, 5376, 1) == (11, 4) and parts_of(42, 43008, 1) == (2, 21) and parts_of(1, 128, 1) == (1, 1)
    for blocks in range(1, 50):
        for columns in (128, 5376, 43008, 262144):
            parts, each = parts_of(blocks, columns, 2)
            assert (parts - 1) * each < blocks <= parts * each
    weight, x = packed("mcg", 32, 24, 8), torch.randn(3, 384)
    assert parts_of(3, 128, 1) == (3, 1)
    expected = linear(x, [weight], backend="reference")
    assert rms_error(linear(x, [weight], backend="triton"), expected) <= EXL3_TRITON[torch.float32]
    moved = x.roll(128, dims=1)
    assert rms_error(linear(moved, [weight], backend="triton"), expected) > EXL3_TRITON[torch.float32]


def check_magnitudes() -> None:
    """Activations far beyond float16, blocks of different sizes, zeros; what is not finite keeps to its row."""
    weight = packed("mcg", 64, 16, 8)
    x = torch.randn(6, 256) * torch.tensor([1e-30, 1e-6, 1.0, 1e6, 1e25, 0.0]).unsqueeze(1)
    x[2, 128:] *= 1e4
    expected, got = (linear(x, [weight], backend=backend) for backend in ("reference", "triton"))
    for row in range(5):
        assert rms_error(got[row], expected[row]) <= EXL3_TRITON[torch.float32]
    assert torch.equal(got[5], torch.zeros(128))
    x[1, 200], x[4, 3] = float("nan"), float("inf")
    finite = linear(x, [weight], backend="triton").isfinite()
    assert finite.any(dim=1).tolist() == finite.all(dim=1).tolist() == [True, False, True, True, False, True]


def check_dense_columns() -> None:
    """Many rows, with a scratch of one block of columns."""
    weight, x, bias = packed("3inst", 80, 8, 16), torch.randn(70, 128), torch.randn(256)
    assert len(x) > kernels.FUSED_ROWS
    expected = linear(x, [weight], bias, backend="reference")
    whole = linear(x, [weight], bias, backend="triton")
    kernels.SCRATCH_WEIGHTS, before = 1, kernels.SCRATCH_WEIGHTS
    by_blocks = linear(x, [weight], bias, backend="triton")
    kernels.SCRATCH_WEIGHTS = before
    for got in (whole, by_blocks):
        assert rms_error(got, expected) <= EXL3_TRITON[torch.float32]
    wrong = linear(x, [Exl3Weight(weight.trellis, weight.suh, weight.svh * 1.1, "3inst")], bias, backend="triton")
    assert rms_error(wrong, expected) > EXL3_TRITON[torch.float32]


def check_shapes() -> None:
    """Leading dimensions are kept, and no rows are nothing to do."""
    x, weight = torch.randn(2, 3, 128), packed("mcg", 32, 8, 8)
    got = linear(x, [weight], backend="triton")
    assert torch.equal(got, linear(x.view(6, 128), [weight], backend="triton").view(2, 3, 128))
    assert linear(x[:, :0], [weight], backend="triton").shape == (2, 0, 128)


def check_step(codebook: str, width: int) -> None:
    """One window, of more tiles than a program takes: minima and choices of the definition, to the bit."""
    bits, table = step_bits(width), viterbi.values(torch.arange(viterbi.STATES), codebook).float()
    tiles = torch.randn(5, WINDOWS)
    added, leaving = bits[2:4]
    minima = torch.rand(5, viterbi.STATES >> added)

    def least_costs(target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        costs = (table - target.unsqueeze(1)).square_()
        costs.view(5, -1, 1 << added).add_(minima.unsqueeze(2))
        return costs.view(5, 1 << leaving, -1).min(dim=1)

    least, choice = least_costs(tiles[:, 2])
    result, choices = torch.empty_like(least), torch.empty(least.shape, dtype=torch.uint8)
    block = min(1 << (STATE_BITS - leaving), 4096)  # few programs: the interpreter runs one after the other
    viterbi_triton.step(tiles, 2, (added, leaving), codebook, minima, result, choices, block)
    assert torch.equal(result, least) and torch.equal(choices.long(), choice)
    assert not torch.equal(result, least_costs(tiles[:, 3])[0])


def check_way_back() -> None:
    """Through choices drawn at random, against a walk in plain Python: windows that add 3 and 4 bits in turn."""
    bits, count = (3, 4), 3
    choices = torch.randint(0, 8, (WINDOWS, count, viterbi.STATES >> 3), dtype=torch.uint8)
    ends = torch.randint(0, viterbi.STATES >> bits[0], (count,))
    path = viterbi_triton.way_back(choices, ends, bits).tolist()
    for tile, kept in enumerate(ends.tolist()):
        for window in reversed(range(WINDOWS)):
            added, leaving = bits[window % 2], bits[(window + 1) % 2]
            highest = int(choices[window].flatten()[tile * (viterbi.STATES >> leaving) + kept])
            state = (highest << (STATE_BITS - leaving)) | kept
            assert path[tile][window] == state
            kept = state >> added


def check_search(codebook: str, width: int) -> None:
    """Whole paths, as the definition finds them, and what they store decodes to them."""
    tiles = torch.randn(2, WINDOWS)
    viterbi_triton.BLOCK, before = 1 << (STATE_BITS - max(step_bits(width))), viterbi_triton.BLOCK
    path = viterbi_triton.search(tiles, width, codebook)
    viterbi_triton.BLOCK = before
    assert torch.equal(path, viterbi.search(tiles, width, codebook))
    pack(path, width)  # refuses windows that disagree
    assert not torch.equal(path, viterbi.search(tiles * 1.1, width, codebook))


CHECKS = (
    check_float16,
    check_layouts,
    check_orders,
    check_what_is_wrong_shows,
    check_parts,
    check_magnitudes,
    check_dense_columns,
    check_shapes,
    check_way_back,
)


def main(formats: list[tuple[str, int]]) -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is NaN from here on
    assert torch.empty(1).isnan()
    for codebook, width in formats:
        check_dense(codebook, width)
        if formats == FORMATS or width in (24, 48, 112):  # the same windows as those of `check_dense`
            check_product(codebook, width)
        print("format", codebook, width, flush=True)
    if formats == FORMATS:
        for codebook, width in STEPS:
            check_step(codebook, width)
            print("step", codebook, width, flush=True)
        for codebook, width in SEARCHED:
            check_search(codebook, width)
            print("search", codebook, width, flush=True)
        return
    for codebook, width in STEPS[:3]:
        check_step(codebook, width)
        print("step", codebook, width, flush=True)
    for rows, dtype in ROWS:
        check_linear(rows, dtype)
        print("check_linear", rows, dtype, flush=True)
    for once in CHECKS:
        once()
        print(once.__name__, flush=True)


if __name__ == "__main__":
    main(FORMATS if "--all-formats" in sys.argv else SOME)
