"""EXL3 by its definition, in torch on any device. Source: ExLlamaV3's format, 1.6.

A linear's `trellis` holds 16 x 16 tiles of What[in, out]. A tile is a ring of 256 K bits: its int16 in pairs make
little-endian uint32 words, each read from its highest bit. Window t (0..255) is the 16 bits that end before bit
floor((t + 1) K), around the ring; as a number it is the state of one weight. Windows overlap: each adds K bits.

A codebook makes a float16 of a state s, in uint32 arithmetic:

    3inst   x = s * 89226354 + 64248484     value = f16(lower half of y) + f16(upper half of y),
    mcg     x = s * 0xCBAC1FED              y = (x & 0x8FFF8FFF) ^ 0x3B603B60
    mul1    x = s * 0x83DCD12D              value = fma(1024 + sum of the bytes of x, f16 0x1EEE, f16 0xC931)

each rounded to float16 once. The weight is W = diag(suh) H What H diag(svh), H the Hadamard matrix of 128 over
sqrt(128), block by block. Here: What in float32; `hadamard.transform` along in, then along out; times suh / 128, then
times svh, each rounded to float32; then the output dtype. That is our definition of the last bits: ExLlamaV3, which
rotates activations instead, rounds a dense matrix to float16 after every one of these steps.
"""

from collections.abc import Sequence

import torch

from gemma4q_kernels.exl3.format import Exl3Weight, Problem
from gemma4q_kernels.exl3.hadamard import transform
from gemma4q_kernels.exl3_layout import BLOCK, TILE
from gemma4q_kernels.support import YES, Support

_MASK, _EXPONENTS = 0x8FFF8FFF, 0x3B603B60
_MULTIPLIERS = {"3inst": (89226354, 64248484), "mcg": (0xCBAC1FED, 0), "mul1": (0x83DCD12D, 0)}
_MUL1_SCALE, _MUL1_OFFSET = 0x1EEE, 0xC931


def can_implement(problem: Problem) -> Support:
    """Always."""
    return YES


def ring_positions(device: torch.device | str = "cpu") -> torch.Tensor:
    """Which window holds the weight at (row, column) of a tile: int64 [16, 16]."""
    row = torch.arange(TILE, device=device).unsqueeze(1)
    column = torch.arange(TILE, device=device)
    return 32 * (column & 7) + 8 * ((row & 7) >> 1) + (row & 1) + 2 * (row >> 3) + 4 * (column >> 3)


def window_ends(width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The ring bit behind each window, for tiles of `width` int16: int64 [256], from floor(K) on, to 256 K."""
    return torch.arange(1, TILE * TILE + 1, device=device) * width // TILE


def states(trellis: torch.Tensor) -> torch.Tensor:
    """Windows in ring order: int16 [.., 16 K] to int64 [.., 256], 0..65535."""
    units = trellis.reshape(*trellis.shape[:-1], -1, 2).flip(-1).flatten(-2).long() & 0xFFFF  # 16 ring bits each
    ends = window_ends(trellis.shape[-1], trellis.device)
    last = (ends - 1) // 16
    both = (units[..., last - 1] << 16) | units[..., last]  # -1: around the ring
    return (both >> (-ends % 16)) & 0xFFFF


def values(state: torch.Tensor, codebook: str) -> torch.Tensor:
    """What a codebook makes of states: int64, 0..65535, to float16 of the same shape."""
    multiplier, increment = _MULTIPLIERS[codebook]
    x = (state * multiplier + increment) & 0xFFFFFFFF
    if codebook == "mul1":
        total = 1024 + (x & 0xFF) + (x >> 8 & 0xFF) + (x >> 16 & 0xFF) + (x >> 24)
        constants = _half(torch.tensor([_MUL1_SCALE, _MUL1_OFFSET], device=state.device))
        return (total.float() * constants[0] + constants[1]).half()  # the float32 sum is exact: at most 23 bits
    y = (x & _MASK) ^ _EXPONENTS
    return (_half(y & 0xFFFF) + _half(y >> 16)).half()  # exact in float32 too


def _half(bits: torch.Tensor) -> torch.Tensor:
    """Float32 values of float16 numbers given by their bits: int64, 0..65535."""
    halves: torch.Tensor = ((bits ^ 0x8000) - 0x8000).to(torch.int16).view(torch.float16)
    return halves.float()


def decode(trellis: torch.Tensor, codebook: str) -> torch.Tensor:
    """What, the weight before its transforms: int16 [in/16, out/16, 16 K] to float16 [in, out]."""
    tiles = values(states(trellis), codebook)[..., ring_positions(trellis.device)]
    return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def reconstruct(weight: Exl3Weight, dtype: torch.dtype) -> torch.Tensor:
    """See `gemma4q_kernels.exl3.reconstruct`. Holds about 40 bytes a weight."""
    dense = transform(transform(decode(weight.trellis, weight.codebook).float(), dim=0), dim=1)
    return (dense * (weight.suh.float() / BLOCK).unsqueeze(1) * weight.svh.float()).to(dtype)


def linear(x: torch.Tensor, shards: Sequence[Exl3Weight], bias: torch.Tensor | None) -> torch.Tensor:
    """See `gemma4q_kernels.exl3.linear`. In float64, and rounded once."""
    out = torch.cat([_multiply(x.double(), shard) for shard in shards], dim=-1)
    return (out if bias is None else out + bias.double()).to(x.dtype)


def _multiply(x: torch.Tensor, weight: Exl3Weight) -> torch.Tensor:
    product = transform(x * weight.suh.double()) @ decode(weight.trellis, weight.codebook).double()
    return transform(product) * weight.svh.double() / BLOCK
