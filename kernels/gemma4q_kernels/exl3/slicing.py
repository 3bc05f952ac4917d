"""Part of an EXL3 linear: the features of one rank, cut from tensors as files hold them.

The Hadamard transforms work on blocks of 128 features, so a part consists of whole blocks. Boundaries need not lie
between blocks: a linear is linear in its inputs, and its outputs do not depend on each other. So a part takes every
block that it touches, an input that belongs to another rank is zero there, and an output that does is cut off:

    y[outputs] = sum over ranks of  (x[inputs], zeros around it) W [the blocks of inputs, the blocks of outputs] [cut]

exactly. Two ranks with a boundary within a block both hold it. Features that only pad the last block are the same case.
"""

import torch

from gemma4q_kernels.exl3_layout import TILE, Span


def cut(name: str, tensor: torch.Tensor, inputs: Span, outputs: Span) -> torch.Tensor:
    """The blocks of a part.

    Args:
        name: "trellis", "suh" or "svh".
        tensor: that tensor of the whole linear: int16 [in/16, out/16, 16 K], float16 [in] or [out].

    Returns:
        A view in the same layout.

    Raises:
        ValueError: an unknown name; a span that reaches beyond the tensor.
    """
    if name == "trellis":
        return _narrow(name, _narrow(name, tensor, 0, inputs, TILE), 1, outputs, TILE)
    if name not in ("suh", "svh"):
        raise ValueError(f"name: got {name!r}, expected 'trellis', 'suh' or 'svh'")
    return _narrow(name, tensor, 0, inputs if name == "suh" else outputs, 1)


def _narrow(name: str, tensor: torch.Tensor, axis: int, span: Span, unit: int) -> torch.Tensor:
    features = tensor.shape[axis] * unit
    if span.first + span.covered > features:
        raise ValueError(f"{name}: got {features} features, expected {span.first + span.covered} or more for {span}")
    return tensor.narrow(axis, span.first // unit, span.covered // unit)
