"""EXL3, the trellis format of ExLlamaV3: 1 to 8 bits a weight, decoded without tables in the file.

    W = diag(suh) H What H diag(svh)        y = ((x * suh) H What H) * svh (+ bias)

H is the Hadamard matrix of 128 over sqrt(128), block by block. Tensors of a linear, as checkpoints store them:

    trellis   int16 [in/16, out/16, 16 K]   tiles of What, K bits a weight; K differs between tensors of one model
    suh, svh  float16 [in], [out]           signs times scales; old files: `su`, `sv`, packed signs int16 [dim/16]
    mcg, mul1 scalars                       their presence names the codebook (`codebook_of`)

Both dimensions are multiples of 128, zero-padded by the writer; padded outputs have svh = 0. Fused linears are several
such sets: each has its own input vector suh, and may have its own K.

    format.py     shapes, checks, packed signs    reference.py  the definition; the oracle
    hadamard.py   the transform                   cpu.py        tables, a block at a time
    dispatch.py   which backend, and why          triton*.py    GPUs
    slicing.py    a rank's blocks of a linear     cpu_few_rows.py, few_rows_column.py  decoding in registers, by numba

Writing (`quantize_linear`; `encode` for tiles alone):

    regularize.py  signs, scales, rotation        ldlq.py         feedback of errors, by the inputs' second moments
    quantize.py    one linear, from end to end    encode.py       which search, and why
    packing.py     paths to trellises             viterbi.py      the search's definition, in torch
    vectors.py     16 floats in numba             viterbi_cpu.py  the search by numba
                                                  viterbi_triton.py  the search on GPUs

Not done here: gradients.
"""

from collections.abc import Sequence

import torch

from gemma4q_kernels.exl3.dispatch import BACKENDS, Choice, backend_module, choose
from gemma4q_kernels.exl3.encode import ENCODERS, Encoded, choose_encoder, encode
from gemma4q_kernels.exl3.format import Exl3Weight, check_linear, unpack_signs
from gemma4q_kernels.exl3.packing import pack
from gemma4q_kernels.exl3.quantize import Quantized, peak_bytes, quantize_linear
from gemma4q_kernels.exl3_layout import CODEBOOKS, codebook_of

__all__ = [
    "BACKENDS",
    "CODEBOOKS",
    "ENCODERS",
    "Choice",
    "Encoded",
    "Exl3Weight",
    "Quantized",
    "choose",
    "choose_encoder",
    "codebook_of",
    "encode",
    "linear",
    "pack",
    "peak_bytes",
    "quantize_linear",
    "reconstruct",
    "unpack_signs",
]


def reconstruct(
    trellis: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    codebook: str,
    *,
    dtype: torch.dtype = torch.float16,
    backend: str = "auto",
) -> torch.Tensor:
    """The dense weight. Every backend returns the same bits (`reference.py` defines them).

    Args:
        trellis: int16 [in/16, out/16, 16 K].
        suh, svh: float16 [in] and [out], or packed signs, int16 [in/16] and [out/16].
        codebook: "3inst", "mcg" or "mul1".
        dtype: float16, bfloat16 or float32, of the result; rounded to once.
        backend: "auto" or one of `BACKENDS`.

    Returns:
        [in, out] of `dtype`: the transpose of what torch's linears hold.

    Raises:
        ValueError: shapes, dtypes, devices or names that do not fit; a backend that cannot run this.
    """
    weight = Exl3Weight(trellis, suh, svh, codebook)
    k, n = weight.in_features, weight.out_features
    choice = choose(trellis.device, k, n, k, dtype, backend)
    dense: torch.Tensor = backend_module(choice.name).reconstruct(weight, dtype)
    return dense


def linear(
    x: torch.Tensor,
    shards: Sequence[Exl3Weight],
    bias: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Multiply with packed weights, a block of columns at a time, so that no dense weight is ever whole in memory.

    Args:
        x: float16, bfloat16 or float32 [.., in]. All arithmetic is float32 up to the last rounding.
        shards: the parts of a fused linear, or one weight; their outputs lie behind each other.
        bias: float [out], added in float32.
        backend: "auto" or one of `BACKENDS`.

    Returns:
        [.., out] of the dtype of `x`.

    Raises:
        ValueError: as `reconstruct`; no shards, or shards of other inputs.
    """
    k, n = check_linear(x, shards, bias)
    choice = choose(x.device, x.numel() // k, n, k, x.dtype, backend)
    if not x.numel():
        return x.new_empty((*x.shape[:-1], n))
    out: torch.Tensor = backend_module(choice.name).linear(x, shards, bias)
    return out
