"""Rounding with feedback (LDLQ): tiles still to be encoded make up for the errors of those that are.

With second moments M = L D L^T of the inputs, L lower triangular with blocks of 16 on its diagonal that are 1, the
error E of a weight [in, out] costs tr(E^T M E) = sum over blocks of inputs of |D^(1/2) (L^T E)_j|^2, where
(L^T E)_j = E_j + sum over i > j of L_ij^T E_i. So inputs are encoded from the last to the first, block j as what
is left of it behind the errors of later ones. These are gathered for 128 inputs at a time in one product.

Source: Chee et al., "QuIP: 2-Bit Quantization of Large Language Models With Guarantees", 2023.
"""

from collections.abc import Callable

import torch

from gemma4q_kernels.exl3.ordered import cholesky, product
from gemma4q_kernels.exl3_layout import BLOCK, TILE

# Of the mean of the diagonal, added to it. More where float32 finds no factor.
DAMPING = (0.025, 0.1, 0.4)


def feedback_factor(moments: Callable[[], torch.Tensor]) -> torch.Tensor:
    """L of M = L D L^T: how errors of later inputs move earlier ones.

    Args:
        moments: makes M, float32 [in, in], symmetric, positive semidefinite. It is called again where a factor has to
            be looked for with more damping: the first one was looked for in M's place.

    Returns:
        float32 [in, in], lower triangular, of which blocks of 16 on the diagonal are 1.

    Raises:
        ValueError: moments that are not positive semidefinite, and not close to it.
    """
    for damping in DAMPING:
        matrix = moments()
        diagonal = matrix.diagonal()
        diagonal.add_(damping * (float(diagonal.mean()) or 1.0))
        root = cholesky(matrix)
        if root is not None:
            return _with_unit_blocks(root)
    raise ValueError(
        f"hessian: no Cholesky factor with {DAMPING[-1]:g} of its mean diagonal added, expected second moments"
    )


def _with_unit_blocks(root: torch.Tensor) -> torch.Tensor:
    """Columns of blocks times the inverse of the block on the diagonal, in their place."""
    for start in range(0, len(root), BLOCK):
        blocks = root[start:, start : start + BLOCK].view(-1, BLOCK // TILE, TILE).transpose(0, 1)
        on_diagonal = torch.stack([each[TILE * i :][:TILE] for i, each in enumerate(blocks)])
        blocks.copy_(torch.linalg.solve_triangular(on_diagonal, blocks, upper=False, left=False))
    return root


def encode_with_feedback(
    targets: Callable[[slice], torch.Tensor],
    shape: tuple[int, int],
    factor: torch.Tensor | None,
    encode_rows: Callable[[slice, torch.Tensor], torch.Tensor],
) -> None:
    """Encode 16 inputs after the other, from the last to the first.

    Args:
        targets: the weight of 128 inputs, float32 [128, out].
        shape: of the weight, (in, out).
        factor: from `feedback_factor`; None: no feedback.
        encode_rows: gets 16 inputs, and what to encode for them, float32 [16, out]; returns what that decodes to.
    """
    errors: torch.Tensor | None = None

    def from_later(rows: slice, later: slice) -> torch.Tensor | float:
        return 0.0 if factor is None or errors is None else product(factor[later, rows].t(), errors[later])

    for start in reversed(range(0, shape[0], BLOCK)):
        group = slice(start, start + BLOCK)
        target = targets(group)
        if errors is None:
            errors = target.new_empty(shape)
        wanted = target + from_later(group, slice(group.stop, shape[0]))
        for first in reversed(range(0, BLOCK, TILE)):
            rows, inside = slice(start + first, start + first + TILE), slice(first, first + TILE)
            aim = wanted[inside] + from_later(rows, slice(rows.stop, group.stop))
            errors[rows] = target[inside] - encode_rows(rows, aim)
