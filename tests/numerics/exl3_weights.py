"""Random EXL3 weights for tests: every format, any size."""

import torch
from gemma4q_kernels.exl3 import CODEBOOKS, Exl3Weight, reconstruct
from gemma4q_kernels.exl3_layout import HALF_WIDTHS, WIDTHS

FORMATS = [(codebook, width) for codebook in CODEBOOKS for width in WIDTHS] + [("mul1", w) for w in HALF_WIDTHS]


def packed(codebook: str, width: int, rows: int = 8, columns: int = 8) -> Exl3Weight:
    """A random weight of 16 x 16 tiles: any bits are a valid trellis."""
    trellis = torch.randint(-(2**15), 2**15, (rows, columns, width), dtype=torch.int16)
    suh, svh = ((torch.rand(16 * size) + 0.1) * torch.randn(16 * size).sign() for size in (rows, columns))
    return Exl3Weight(trellis, suh.half(), (svh * 0.02).half(), codebook)


def dense(weight: Exl3Weight, dtype: torch.dtype = torch.float16, backend: str = "auto") -> torch.Tensor:
    """The weight as a matrix [in, out]."""
    return reconstruct(weight.trellis, weight.suh, weight.svh, weight.codebook, dtype=dtype, backend=backend)
