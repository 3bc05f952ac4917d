"""EXL3's encoder: packing, the searches against each other, closed rings, and how well Gaussian tiles are encoded."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from exl3_weights import FORMATS, packed
from gemma4q_kernels import exl3
from gemma4q_kernels.exl3 import CODEBOOKS, choose_encoder, encode, pack, reference, viterbi, viterbi_cpu
from gemma4q_kernels.exl3.packing import step_bits, width_of
from gemma4q_kernels.exl3_layout import HALF_WIDTHS, WIDTHS
from tolerances import EXL3_CLOSED_RING, EXL3_GAUSSIAN, EXL3_SAME_COST

# Where tiles are encoded best, over the standard deviation of the codebook.
SCALES = {
    1.0: 1.1,
    1.5: 1.0,
    2.0: 1.0,
    2.5: 0.95,
    3.0: 0.92,
    3.5: 0.9,
    4.0: 0.87,
    5.0: 0.82,
    6.0: 0.8,
    7.0: 0.77,
    8.0: 0.75,
}


def gaussian(count: int, bits: float, codebook: str) -> torch.Tensor:
    deviation = reference.values(torch.arange(2**16), codebook).float().std()
    return torch.randn(count, 16, 16) * deviation * SCALES[bits]


def in_ring_order(tiles: torch.Tensor) -> torch.Tensor:
    ring = torch.empty(len(tiles), 256)
    ring[:, reference.ring_positions().flatten()] = tiles.flatten(1)
    return ring


def costs(path: torch.Tensor, ring: torch.Tensor, codebook: str) -> torch.Tensor:
    """Squared errors of tiles, float64."""
    return (reference.values(path, codebook).double() - ring.double()).square().sum(dim=1)


def table(codebook: str) -> torch.Tensor:
    return reference.values(torch.arange(2**16), codebook).float()


def nmse(tiles: torch.Tensor, decoded: torch.Tensor) -> float:
    return float((decoded - tiles).double().square().sum() / tiles.double().square().sum())


@pytest.mark.parametrize("width", sorted(WIDTHS + HALF_WIDTHS))
def test_packing_is_the_inverse_of_reading(width: int) -> None:
    """Any bits are a ring, so random ones reach every bit of every width."""
    trellis = torch.randint(-(2**15), 2**15, (3, 5, width), dtype=torch.int16)
    windows = reference.states(trellis)
    assert torch.equal(pack(windows, width), trellis)
    assert torch.equal(pack(windows[0].int(), width), trellis[0])
    assert torch.equal(pack(windows.to(torch.uint16).view(torch.int16), width), trellis)


@pytest.mark.parametrize("width", sorted(WIDTHS + HALF_WIDTHS))
def test_windows_that_disagree_are_refused(width: int) -> None:
    windows = reference.states(torch.randint(-(2**15), 2**15, (2, width), dtype=torch.int16))
    for window in (0, 100, 255):  # the last one meets the first
        broken = windows.clone()
        broken[1, window] ^= 1 << 15
        with pytest.raises(ValueError, match="windows disagree where they overlap: not a tail-biting path"):
            pack(broken, width)


def test_steps_are_as_wide_as_the_format_says() -> None:
    assert step_bits(48) == [3] * 256
    assert step_bits(40) == [2, 3] * 128
    assert [width_of(bits, "mul1") for bits in (1, 1.5, 2.5, 3.5, 8)] == [16, 24, 40, 56, 128]


@pytest.mark.parametrize(("codebook", "width"), FORMATS)
def test_what_is_stored_decodes_to_what_was_returned(codebook: str, width: int) -> None:
    bits = width / 16
    tiles = gaussian(64 if width == 64 else 8, bits, codebook)
    got = encode(tiles, bits, codebook)
    assert (got.trellis.dtype, got.trellis.shape) == (torch.int16, (len(tiles), width))
    assert got.values.dtype == torch.float32 and got.values.shape == tiles.shape
    decoded = reference.decode(got.trellis.view(-1, 8, width), codebook)  # tiles of 8 columns
    expected = got.values.view(-1, 8, 16, 16).transpose(1, 2).reshape(decoded.shape)
    assert torch.equal(decoded.float(), expected)
    swapped = got.trellis.view(-1, width // 2, 2).flip(-1).reshape(-1, 8, width)
    assert not torch.equal(reference.decode(swapped, codebook).float(), expected)


def test_a_tile_that_a_ring_holds_is_found() -> None:
    """Without an error there is one path at most, whatever its ends."""
    for width in (32, 64, 128):
        trellis = packed("mcg", width, 8, 8).trellis[0]
        tiles = reference.values(reference.states(trellis), "mcg").float()
        found = encode(tiles[:, reference.ring_positions()], width / 16, "mcg")
        assert torch.equal(found.values, tiles[:, reference.ring_positions()])


@pytest.mark.parametrize(("codebook", "width"), [("3inst", 16), ("mul1", 24), ("mul1", 40), ("mcg", 48), ("mcg", 128)])
def test_numba_finds_paths_as_cheap_as_the_reference(codebook: str, width: int) -> None:
    tiles = in_ring_order(gaussian(2, width / 16, codebook))
    best = costs(viterbi.search(tiles, width, codebook), tiles, codebook)
    found = viterbi_cpu.search(tiles, width, codebook)
    assert found.dtype == torch.int64
    assert (costs(found, tiles, codebook) - best).abs().max() <= EXL3_SAME_COST * best.min()
    assert (costs(found, tiles * 1.1, codebook) - best).abs().max() > EXL3_SAME_COST * best.min()


@pytest.fixture
def threads_of_torch() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_share_tiles(threads_of_torch: None) -> None:
    tiles = in_ring_order(gaussian(5, 4.0, "mcg"))
    paths = []
    for threads in (1, 3, 8):  # more than there are tiles
        torch.set_num_threads(threads)
        paths.append(viterbi_cpu.search(tiles, 64, "mcg"))
    assert torch.equal(paths[0], paths[1]) and torch.equal(paths[0], paths[2])


@pytest.mark.parametrize("bits", [3.0, 8.0])
def test_rings_are_closed_at_little_cost(bits: float) -> None:
    """A path with free ends is never dearer than a ring. It is none: packing refuses it."""
    tiles, steps = in_ring_order(gaussian(3, bits, "mcg")), step_bits(int(16 * bits))
    free = viterbi.cheapest_path(tiles, steps, table("mcg"), None)
    closed = viterbi_cpu.search(tiles, int(16 * bits), "mcg")
    ratio = float(costs(closed, tiles, "mcg").sum() / costs(free, tiles, "mcg").sum())
    assert 1 < ratio <= EXL3_CLOSED_RING
    with pytest.raises(ValueError, match="not a tail-biting path"):
        pack(free, int(16 * bits))
    # Closed anywhere, instead of where the first pass went through.
    blindly = viterbi.cheapest_path(tiles, steps, table("mcg"), torch.zeros(3, dtype=torch.int64))
    assert costs(blindly, tiles, "mcg").sum() / costs(free, tiles, "mcg").sum() > EXL3_CLOSED_RING


@pytest.mark.slow
def test_two_passes_find_the_best_ring_of_all() -> None:
    """At 8 bits there are 256 ways to close a ring. (At 2 and 3 bits, two passes were 0.4 and 0.7% off the best.)"""
    tile = in_ring_order(gaussian(1, 8.0, "mcg"))
    starts = torch.arange(256)
    every = viterbi.cheapest_path(tile.expand(256, 256), step_bits(128), table("mcg"), starts)
    best = costs(every, tile, "mcg").min()
    assert costs(viterbi_cpu.search(tile, 128, "mcg"), tile, "mcg")[0] <= best * (1 + EXL3_SAME_COST)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", EXL3_GAUSSIAN)
def test_gaussian_tiles_are_encoded_as_well_as_published(bits: float, codebook: str) -> None:
    """No code of so many bits has a relative error below 4^-bits."""
    tiles = gaussian(24, bits, codebook)
    decoded = encode(tiles, bits, codebook).values
    assert 4**-bits < nmse(tiles, decoded) <= EXL3_GAUSSIAN[bits]
    assert nmse(tiles, decoded * 1.1) > EXL3_GAUSSIAN[bits]


def test_encoding_can_do_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = gaussian(1, 8.0, "mcg")
    expected = encode(tiles, 8, "mcg")
    assert choose_encoder("cpu").name == "numba"
    monkeypatch.setitem(sys.modules, "numba", None)  # as where it is not installed
    choice = choose_encoder("cpu")
    assert choice.name == "reference"
    assert choice.refusals == (("numba", "numba is not installed (pip install 'vllm-gemma4q[exl3]')"),)
    with pytest.raises(ValueError, match=r"numba cannot encode on cpu: numba is not installed .*vllm-gemma4q\[exl3\]"):
        encode(tiles, 8, "mcg", backend="numba")
    assert nmse(tiles, encode(tiles, 8, "mcg").values) == pytest.approx(nmse(tiles, expected.values), EXL3_SAME_COST)


def test_importing_exl3_imports_neither_numba_nor_triton() -> None:
    script = "import sys; from gemma4q_kernels import exl3; exl3.encode, exl3.quantize_linear; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "gemma4q_kernels.exl3.quantize" in loaded and loaded.isdisjoint({"numba", "triton"})


TILES = torch.zeros(2, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TILES, 0, "mcg"), "bits: got 0, expected one of 1, 2, 3, 4, 5, 6, 7, 8 with codebook 'mcg'"),
        ((TILES, 2.5, "mcg"), "bits: got 2.5, expected one of 1, 2, 3, 4, 5, 6, 7, 8 with codebook 'mcg'"),
        ((TILES, 4.5, "mul1"), "bits: got 4.5, expected one of 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8 with codebook"),
        ((TILES, 4, "mcg2"), "codebook: got 'mcg2', expected one of"),
        ((TILES.double(), 4, "mcg"), "tiles: got torch.float64 (2, 16, 16), expected torch.float32 [T, 16, 16]"),
        ((TILES.flatten(1), 4, "mcg"), "tiles: got torch.float32 (2, 256)"),
        ((TILES[:0], 4, "mcg"), "tiles: got torch.float32 (0, 16, 16)"),
        ((TILES / 0, 4, "mcg"), "tiles: got NaN or infinity, expected finite numbers"),
    ],
)
def test_what_cannot_be_encoded_is_named(arguments: tuple[torch.Tensor, float, str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        encode(*arguments)
    assert message in str(error.value)


def test_unknown_backends_and_bad_states_are_named() -> None:
    with pytest.raises(ValueError, match=r"backend: got 'beam', expected 'auto' or one of \['numba', 'triton'"):
        encode(TILES, 4, "mcg", backend="beam")
    with pytest.raises(ValueError, match="backend: numba cannot encode on meta: numba compiles for CPUs"):
        choose_encoder("meta", "numba")
    with pytest.raises(ValueError, match=r"states: got torch.int64 \(2, 255\), expected integers \[.., 256\]"):
        exl3.pack(torch.zeros(2, 255, dtype=torch.int64), 64)
    with pytest.raises(ValueError, match="width: got 63 int16 a tile"):
        exl3.pack(torch.zeros(2, 256, dtype=torch.int64), 63)
