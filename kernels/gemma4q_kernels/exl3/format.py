"""EXL3 tensors of one linear: names, shapes, checks. The decoding is in `reference.py`.

K below is bits a weight. A tile is 16 x 16 weights, a block of the Hadamard transforms is 128 features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gemma4q_kernels.exl3_layout import BLOCK, CODEBOOKS, HALF_WIDTHS, TILE, WIDTHS

OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Problem:
    """[M, K] x [K, N] -> [M, N] of `out_dtype` on `device`; reconstruction is M = K."""

    device: torch.device
    m: int
    n: int
    k: int
    out_dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.out_dtype not in OUT_DTYPES:
            raise ValueError(f"dtype: got {self.out_dtype}, expected one of {OUT_DTYPES}")


@dataclass(frozen=True, eq=False)
class Exl3Weight:
    """One packed linear, or one shard of a fused one: shards of one linear may differ in K and in `suh`.

    Attributes:
        trellis: int16 [in/16, out/16, 16 K].
        suh, svh: float16 [in] and [out]: signs times scales. Packed signs of old files (`unpack_signs`) are accepted
            here and stored unpacked.
        codebook: one of `CODEBOOKS`.

    Raises:
        ValueError: what does not fit, with what was found and what is expected.
    """

    trellis: torch.Tensor
    suh: torch.Tensor
    svh: torch.Tensor
    codebook: str

    def __post_init__(self) -> None:
        check_codebook(self.codebook)
        check_trellis(self.trellis, self.codebook)
        for name, size in (("suh", self.in_features), ("svh", self.out_features)):
            object.__setattr__(self, name, _signs(name, getattr(self, name), size, self.trellis.device))

    @property
    def in_features(self) -> int:
        """Input features, padding included."""
        return TILE * self.trellis.shape[0]

    @property
    def out_features(self) -> int:
        """Output features, padding included."""
        return TILE * self.trellis.shape[1]

    @property
    def bits(self) -> float:
        """Bits a weight, scales not counted."""
        return self.trellis.shape[2] / TILE


def check_codebook(codebook: str) -> None:
    """Raises ValueError for a name that is not in `CODEBOOKS`."""
    if codebook not in CODEBOOKS:
        raise ValueError(f"codebook: got {codebook!r}, expected one of {CODEBOOKS}")


def check_trellis(trellis: torch.Tensor, codebook: str) -> None:
    """Raises ValueError where `trellis` is not int16 [in/16, out/16, 16 K] of whole blocks, K one of the codebook's."""
    shape = tuple(trellis.shape)
    if trellis.dtype != torch.int16 or trellis.dim() != 3:
        raise ValueError(f"trellis: got {trellis.dtype} {shape}, expected torch.int16 [in/16, out/16, 16 K]")
    tiles = BLOCK // TILE
    if not all(size and size % tiles == 0 for size in shape[:2]):
        raise ValueError(
            f"trellis: got {shape[0]} x {shape[1]} tiles, expected multiples of {tiles} ({BLOCK} features)"
        )
    widths = sorted(WIDTHS + HALF_WIDTHS) if codebook == "mul1" else list(WIDTHS)
    if shape[2] not in widths:
        raise ValueError(f"trellis: got {shape[2]} int16 a tile, expected one of {widths} with codebook {codebook!r}")


def unpack_signs(packed: torch.Tensor) -> torch.Tensor:
    """Signs of old files: int16 [dim/16], bit i of word w set where element 16 w + i is -1, to float16 [dim]."""
    bits = (packed.to(torch.int32).unsqueeze(1) >> torch.arange(16, dtype=torch.int32, device=packed.device)) & 1
    return (1 - 2 * bits).to(torch.float16).flatten()


def _signs(name: str, tensor: torch.Tensor, size: int, device: torch.device) -> torch.Tensor:
    found = (tensor.dtype, tuple(tensor.shape))
    expected = ((torch.float16, (size,)), (torch.int16, (size // TILE,)))
    if found not in expected or tensor.device != device:
        raise ValueError(
            f"{name}: got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
            f"expected torch.float16 [{size}], or packed signs torch.int16 [{size // TILE}], on {device}"
        )
    return unpack_signs(tensor) if tensor.dtype == torch.int16 else tensor


def check_linear(x: torch.Tensor, shards: Sequence[Exl3Weight], bias: torch.Tensor | None) -> tuple[int, int]:
    """Input and output features of a linear of one or more shards.

    Raises:
        ValueError: no shard; shards with other inputs or devices; `x` that is not float [.., in]; `bias` that is not
            float [sum of out].
    """
    if not shards:
        raise ValueError("shards: got none, expected one or more")
    k, n, device = shards[0].in_features, sum(shard.out_features for shard in shards), shards[0].trellis.device
    for index, shard in enumerate(shards):
        if (shard.in_features, shard.trellis.device) != (k, device):
            raise ValueError(
                f"shards[{index}]: got {shard.in_features} inputs on {shard.trellis.device}, expected {k} on {device}"
            )
    if x.dtype not in OUT_DTYPES or x.shape[-1:] != (k,) or x.device != device:
        raise ValueError(
            f"x: got {x.dtype} {tuple(x.shape)} on {x.device}, expected one of {OUT_DTYPES}, [.., {k}], on {device}"
        )
    if bias is not None and (not bias.is_floating_point() or tuple(bias.shape) != (n,) or bias.device != device):
        raise ValueError(
            f"bias: got {bias.dtype} {tuple(bias.shape)} on {bias.device}, expected float [{n}] on {device}"
        )
    return k, n
