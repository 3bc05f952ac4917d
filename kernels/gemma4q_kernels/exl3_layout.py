"""What the headers of an EXL3 checkpoint tell of its linears: sizes of tiles and blocks, codebooks, parts of ranks.

Beside the package `exl3` and not in it: who reads headers alone does not wait for torch to be imported.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

TILE = 16
BLOCK = 128
CODEBOOKS = ("3inst", "mcg", "mul1")
# int16 a tile: 16 K. ExLlamaV3 writes the half rates with mul1 only.
WIDTHS = tuple(TILE * k for k in range(1, 9))
HALF_WIDTHS = (24, 40, 56)


def codebook_of(stored: Iterable[str]) -> str:
    """The codebook of a linear, from the names of its tensors without the linear's own ("trellis", "suh", "mcg", ..).

    Raises:
        ValueError: markers of two codebooks.
    """
    markers = sorted({"mcg", "mul1"} & set(stored))
    if len(markers) > 1:
        raise ValueError(f"codebook: got markers {markers}, expected at most one")
    return markers[0] if markers else "3inst"


class Span(NamedTuple):
    """`size` features from `start` on, and the blocks that hold them.

    Attributes:
        start, size: the features.
    """

    start: int
    size: int

    @property
    def first(self) -> int:
        """The first feature of the first block."""
        return self.start // BLOCK * BLOCK

    @property
    def offset(self) -> int:
        """How many features of the first block lie before the span."""
        return self.start - self.first

    @property
    def covered(self) -> int:
        """Features of all its blocks."""
        return -(-(self.offset + self.size) // BLOCK) * BLOCK

    def embed(self, x: "torch.Tensor") -> "torch.Tensor":
        """[.., size] among zeros: [.., covered]."""
        if self.covered == self.size:
            return x
        padded = x.new_zeros((*x.shape[:-1], self.covered))
        self.extract(padded).copy_(x)
        return padded

    def extract(self, x: "torch.Tensor", at: int = 0) -> "torch.Tensor":
        """The span itself out of [.., covered] that begin at `at` along the last axis: a view [.., size]."""
        return x.narrow(-1, at + self.offset, self.size)
