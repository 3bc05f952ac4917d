"""A weight made ready for the trellis: scaled, signed, rotated until every tile looks normally distributed.

    What = H diag(1 / suh) W diag(1 / svh) H        W [in, out], H the Hadamard matrix of 128 over sqrt(128), by blocks

svh is a sign times the root mean square of its column, about 1 in the mean; suh is another sign times that of its row
behind the first rotation, over the standard deviation that the search likes best. Both are rounded to float16 before
anything is divided by them, so that what is searched for is what will be decoded.

Both dimensions are padded with zeros to multiples of 128. Features that are zero, padded or not, get a scale of 0 and
so decode to exact zeros; the rest of their block is scaled up, to bring it to the variance of the others.
"""

import math
from dataclasses import dataclass

import torch

from gemma4q_kernels.exl3.hadamard import transform
from gemma4q_kernels.exl3_layout import BLOCK

# Where the scale of a whole weight lies within this, suh takes all of it; svh takes the rest.
_OVERALL = (2.0**-8, 2.0**8)


@dataclass(frozen=True, eq=False)
class Regularized:
    """A weight, and what makes any part of it ready.

    Attributes:
        weight: float [in, out], as it was given.
        input_scales: float32 [in], padded: signs and scales of rows behind the first rotation; with them, the second
            one's result has a standard deviation of 1.
        svh: float16 [out], padded.
    """

    weight: torch.Tensor
    input_scales: torch.Tensor
    svh: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Padded."""
        return len(self.input_scales), len(self.svh)

    def suh(self, deviation: float) -> torch.Tensor:
        """float16 [in], for tiles of a standard deviation."""
        return (self.input_scales / deviation).half()

    def rotated(self, suh: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        """What the trellis should decode to: float32 [rows, columns], whole blocks of both."""
        part = _half_rotated(self.weight, self.svh, rows, columns) * _inverse(suh[rows]).unsqueeze(1)
        return transform(part, dim=0) / math.sqrt(BLOCK)


def regularize(weight: torch.Tensor, seed: int) -> Regularized:
    """Measure outputs, and inputs behind the first rotation; signs are drawn from `seed`, the same on every device.

    Args:
        weight: float [in, out], finite, not padded.
    """
    rows, columns = (-(-size // BLOCK) * BLOCK for size in weight.shape)
    generator = torch.Generator().manual_seed(seed)
    signs = [(1.0 - 2 * torch.randint(2, (size,), generator=generator)).to(weight.device) for size in (rows, columns)]
    every_row, every_column = slice(0, rows), slice(0, columns)
    scales = torch.cat([_block_scales(_padded(weight, every_row, block), dim=0) for block in _blocks(columns)])
    typical = _mean_of_some(scales)
    svh = (signs[1] * scales * (_rest(typical) / typical)).half()
    of_inputs = [_block_scales(_half_rotated(weight, svh, block, every_column), dim=1) for block in _blocks(rows)]
    return Regularized(weight, signs[0] * torch.cat(of_inputs), svh)


def rotate_hessian(hessian: torch.Tensor, suh: torch.Tensor) -> torch.Tensor:
    """Second moments of what the inner weight is multiplied with, (x * suh) H.

    Args:
        hessian: float32 [n, n], second moments of the linear's inputs x, not padded.
        suh: float16 [in], padded.

    Returns:
        float32 [in, in].
    """
    rotated = hessian.new_zeros((len(suh), len(suh)))
    rotated[: len(hessian), : len(hessian)] = hessian
    scales = suh.float() / math.sqrt(BLOCK)
    rotated.mul_(scales).mul_(scales.unsqueeze(1))
    for block in _blocks(len(rotated)):
        rotated[block] = transform(rotated[block])
    for block in _blocks(len(rotated)):
        rotated[:, block] = transform(rotated[:, block], dim=0)
    return rotated


def _blocks(size: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, size, BLOCK)]


def _padded(weight: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    """A part in float32, with zeros where it goes beyond the weight."""
    padded = torch.zeros((rows.stop - rows.start, columns.stop - columns.start), device=weight.device)
    part = weight[rows, columns]
    padded[: part.shape[0], : part.shape[1]] = part
    return padded


def _half_rotated(weight: torch.Tensor, svh: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    """W diag(1 / svh) H, of any rows and whole blocks of columns: float32 [rows, columns]."""
    return transform(_padded(weight, rows, columns).mul_(_inverse(svh[columns]))) / math.sqrt(BLOCK)


def _block_scales(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Root mean square along `dim`, times the root of the share of its block that is not zero."""
    scales = weight.square().mean(dim=dim).sqrt()
    share = (scales > 0).float().view(-1, BLOCK).mean(dim=1)
    return scales * share.sqrt().repeat_interleave(BLOCK)


def _mean_of_some(scales: torch.Tensor) -> float:
    """The mean of what is not zero; 1 where all is."""
    some = scales[scales > 0]
    return float(some.mean()) if len(some) else 1.0


def _rest(typical: float) -> float:
    """What svh has to take of an overall scale, so that neither vector leaves the range of float16."""
    return typical / min(max(typical, _OVERALL[0]), _OVERALL[1])


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    """1 / scales in float32, 0 for 0."""
    inverse = 1 / scales.float()
    return inverse.masked_fill_(scales == 0, 0)
