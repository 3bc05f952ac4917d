"""One linear, from a dense weight to what the format stores.

regularize -> the best scale, on a sample of tiles -> rotate the Hessian and factor it -> encode 16 inputs at a time,
with feedback -> decode it all once, for the error that is reported.

Outputs have nothing to do with each other behind the first two steps: an output layer is encoded in parts, and takes
little memory beside its weight (`peak_bytes`). Deterministic on one machine, on CPUs however many threads there are.
Not done: a choice of bits, or a second try with other signs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gemma4q_kernels.exl3 import cpu
from gemma4q_kernels.exl3.encode import choose_encoder, encode
from gemma4q_kernels.exl3.format import Exl3Weight
from gemma4q_kernels.exl3.ldlq import encode_with_feedback, feedback_factor
from gemma4q_kernels.exl3.ordered import product
from gemma4q_kernels.exl3.packing import width_of
from gemma4q_kernels.exl3.reference import values
from gemma4q_kernels.exl3.regularize import Regularized, regularize, rotate_hessian
from gemma4q_kernels.exl3_layout import BLOCK, TILE

_SCALE_RANGE = 0.15  # around what is best for a normal distribution
_SCALE_TRIALS = 5
_SAMPLED_TILES = 32
# Outputs at a time. More to encode than a layer of Gemma 4 has, for a GPU's sake: an eighth of its vocabulary.
_ENCODED, _DECODED = 1 << 15, 1 << 9
_BESIDES = 200_000_000  # bytes: of parts, of a search's states
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, eq=False)
class Quantized:
    """A packed linear, and how far it is from the weight it was made of.

    Attributes:
        weight: of padded sizes; `reconstruct`'s [:in, :out] is the transpose of the weight.
        nmse: squared error over the sum of squares, of the weight decoded to float32.
        proxy: the same of outputs, tr(E H E^T) / tr(W H W^T); `nmse` without a Hessian, or with one of zeros.
    """

    weight: Exl3Weight
    nmse: float
    proxy: float


def quantize_linear(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    bits: float,
    codebook: str = "mcg",
    *,
    seed: int = 0,
    backend: str = "auto",
    progress: Callable[[int], object] | None = None,
) -> Quantized:
    """Quantize the weight of a linear.

    Args:
        weight: float [out, in], as torch's linears hold it; any sizes.
        hessian: second moments of its inputs, the sum or mean of x x^T, float32 [in, in]; None: every input counts
            alike.
        bits: 1 to 8 a weight; 1.5, 2.5 and 3.5 with codebook mul1 only.
        codebook: "3inst", "mcg" or "mul1".
        seed: of the random signs.
        backend: "auto" or one of `exl3.ENCODERS`.
        progress: called with numbers of weights as they are done; they sum up to those of `weight`.

    Returns:
        The packed weight on the device of `weight`, both sizes padded to multiples of 128.

    Raises:
        ValueError: shapes, dtypes, devices, bits or names that do not fit; numbers that are not finite, or whose scales
            are beyond float16; a Hessian that is none; a backend that cannot run here.
    """
    width = width_of(bits, codebook)
    _check(weight, hessian)
    backend = choose_encoder(weight.device, backend).name
    dense = weight.detach().t()
    regular = regularize(dense, seed)
    if not bool(regular.svh.isfinite().all() and regular.input_scales.half().isfinite().all()):
        raise ValueError(f"weight: got magnitudes up to {float(dense.abs().max()):g}, expected scales within float16")
    suh = regular.suh(_best_deviation(regular, bits, codebook, backend))
    factor = None if hessian is None else feedback_factor(lambda: rotate_hessian(hessian, suh))
    inputs, outputs = regular.shape
    trellis = torch.empty((inputs // TILE, outputs // TILE, width), dtype=torch.int16, device=weight.device)

    def encode_part(columns: slice) -> None:
        def encode_rows(rows: slice, aim: torch.Tensor) -> torch.Tensor:
            encoded = encode(aim.view(TILE, -1, TILE).transpose(0, 1), bits, codebook, backend=backend)
            trellis[rows.start // TILE, columns.start // TILE : columns.stop // TILE] = encoded.trellis
            if progress is not None:
                progress(dense[rows, columns].numel())
            return encoded.values.transpose(0, 1).flatten(1)

        shape = (inputs, columns.stop - columns.start)
        encode_with_feedback(lambda rows: regular.rotated(suh, rows, columns), shape, factor, encode_rows)

    for columns in _parts(outputs, _ENCODED):
        encode_part(columns)
    packed = Exl3Weight(trellis, suh, regular.svh, codebook)
    return Quantized(packed, *_errors(packed, dense, hessian))


def peak_bytes(shape: tuple[int, int], bits: float, has_hessian: bool, device: torch.device | str = "cpu") -> int:
    """Memory that quantizing a linear takes at its peak, about, with its weight and its Hessian.

    Args:
        shape: of a weight in 2 bytes, [out, in].
    """
    outputs, inputs = shape
    weights = outputs * inputs * (2 + bits / 8)  # and the trellis
    errors = 4 * inputs * min(outputs, _ENCODED)
    # The Hessian, and its factor in the place of its rotation; a GPU's has a place of its own.
    matrices = has_hessian * (2.2 if torch.device(device).type == "cpu" else 3.2)
    return int(weights + 1.1 * errors + 4 * matrices * inputs**2) + _BESIDES


def _parts(outputs: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, outputs)) for start in range(0, outputs, size)]


def _check(weight: torch.Tensor, hessian: torch.Tensor | None) -> None:
    if not weight.is_floating_point() or weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight: got {weight.dtype} {tuple(weight.shape)}, expected float [out, in]")
    if not _is_finite(weight):
        raise ValueError("weight: got NaN or infinity, expected finite numbers")
    if hessian is None:
        return
    size = weight.shape[1]
    found = (hessian.dtype, tuple(hessian.shape), hessian.device)
    if found != (torch.float32, (size, size), weight.device):
        raise ValueError(
            f"hessian: got {hessian.dtype} {tuple(hessian.shape)} on {hessian.device}, "
            f"expected torch.float32 [{size}, {size}] on {weight.device}"
        )
    if not _is_finite(hessian):
        raise ValueError("hessian: got NaN or infinity, expected finite numbers")


def _is_finite(matrix: torch.Tensor) -> bool:
    return all(bool(matrix[part].isfinite().all()) for part in _parts(len(matrix), _DECODED))


def _best_deviation(regular: Regularized, bits: float, codebook: str, backend: str) -> float:
    """The standard deviation of tiles that is encoded best, by golden-section search on some of them."""
    sample = _sample(regular)
    unit = float(values(torch.arange(1 << 16), codebook).double().std())

    def error(scale: float) -> float:
        scaled = sample * (unit * scale)
        encoded = encode(scaled, bits, codebook, backend=backend)
        return float((encoded.values - scaled).square().sum(dtype=torch.float64)) / scale**2

    low, high = ((1 + sign * _SCALE_RANGE) * _gaussian_scale(bits) for sign in (-1, 1))
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = error(left), error(right)
    for _ in range(_SCALE_TRIALS - 2):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = error(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = error(right)
    return unit * (left if at_left <= at_right else right)


def _gaussian_scale(bits: float) -> float:
    """The standard deviation of normally distributed tiles that is best, over that of the codebook's values.

    A curve through measured ones, from 1.12 at 1 bit to 0.75 at 8 (benchmarks/exl3.py): the smaller the other errors,
    the more those of weights beyond the codebook's largest value count.
    """
    return 0.7 + 0.43 * math.exp((1 - bits) / 3.2)


def _sample(regular: Regularized) -> torch.Tensor:
    """Tiles of standard deviation 1 along a diagonal that is wrapped around: float32 [T, 16, 16]."""
    rows, columns = (size // TILE for size in regular.shape)
    count = min(_SAMPLED_TILES, rows * columns)
    tiles = []
    for index in range(count):
        row, column = TILE * (index * rows // count), TILE * ((index * columns // count + index) % columns)
        top, left = row // BLOCK * BLOCK, column // BLOCK * BLOCK
        block = regular.rotated(regular.input_scales, slice(top, top + BLOCK), slice(left, left + BLOCK))
        tiles.append(block[row - top :, column - left :][:TILE, :TILE])
    return torch.stack(tiles)


def _errors(packed: Exl3Weight, dense: torch.Tensor, hessian: torch.Tensor | None) -> tuple[float, float]:
    """`nmse` and `proxy` of `Quantized`; `dense` is [in, out]."""
    sums = torch.zeros(4, dtype=torch.float64)
    for columns in _parts(packed.out_features, _DECODED):
        part = dense[:, columns].float()
        tiles = slice(columns.start // TILE, columns.stop // TILE)
        weight = Exl3Weight(packed.trellis[:, tiles].contiguous(), packed.suh, packed.svh[columns], packed.codebook)
        error = cpu.reconstruct(weight, torch.float32)[: part.shape[0], : part.shape[1]].sub_(part)
        sums[:2] += torch.stack([_total(each.square()) for each in (error, part)]).cpu()
        if hessian is not None:
            sums[2:] += torch.stack([_total(product(hessian, each) * each) for each in (error, part)]).cpu()
    nmse = _ratio(sums[0], sums[1], 0.0)
    return nmse, nmse if hessian is None else _ratio(sums[2], sums[3], nmse)


def _total(values: torch.Tensor) -> torch.Tensor:
    """The sum, by rows: each is one thread's, so it does not depend on how many there are."""
    return values.sum(dim=1, dtype=torch.float64).sum()


def _ratio(part: torch.Tensor, whole: torch.Tensor, otherwise: float) -> float:
    return float(part / whole) if float(whole) > 0 else otherwise
