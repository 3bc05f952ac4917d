"""The experts of one MoE layer, computed so that they can be watched: expert by expert, on tokens sorted by expert.

Stands in for transformers' `Gemma4TextExperts`, with its parameters and its result (its own implementations fuse the
experts into one kernel, or give no access to what enters `down_proj`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers.activations import ACT2FN

# MKL's float32 products of fewer rows depend, in the last bit, on the number of threads.
_FEWEST_ROWS = 16

Watch = Callable[["Routed"], None]


@dataclass(frozen=True)
class Routed:
    """One call of a layer's experts. T tokens, K experts a token, pairs of both sorted by expert.

    Attributes:
        counts: pairs of each expert.
        entered: [T K, hidden], what `gate_up_proj` gets.
        inner: [T K, intermediate], what `down_proj` gets.
        norms: float32 [T, K], norms of the experts' outputs, in the order that the router gave.
    """

    counts: Sequence[int]
    entered: torch.Tensor
    inner: torch.Tensor
    norms: torch.Tensor


class Experts(torch.nn.Module):
    """Parameters `gate_up_proj` [E, 2 intermediate, hidden] and `down_proj` [E, hidden, intermediate].

    Attributes:
        watch: called with each forward pass, where set.
        matrices: of both, one by one, to compute with instead of the parameters, where set: leaves of a graph whose
            gradients arrive one by one, while that of a slice would be as large as all experts.
    """

    def __init__(self, config: Any):
        super().__init__()
        count, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = torch.nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down_proj = torch.nn.Parameter(torch.empty(count, hidden, width))
        self.act_fn = ACT2FN[config.hidden_activation]
        self.watch: Watch | None = None
        self.matrices: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] | None = None

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Sum of the chosen experts' outputs times their gates.

        Args:
            hidden: [T, hidden].
            index: [T, K], the experts chosen.
            gates: [T, K].

        Returns:
            [T, hidden], the dtype of `hidden`.
        """
        gate_up_proj, down_proj = self.matrices or (self.gate_up_proj.unbind(), self.down_proj.unbind())
        order = index.reshape(-1).argsort(stable=True)
        inverse = order.argsort()
        counts: list[int] = torch.bincount(index.reshape(-1), minlength=len(self.gate_up_proj)).tolist()
        entered = hidden[order // index.shape[1]]
        gate, up = _grouped(entered, gate_up_proj, counts).chunk(2, dim=-1)
        inner = self.act_fn(gate) * up
        outputs = _grouped(inner, down_proj, counts)[inverse].reshape(*index.shape, -1)
        if self.watch is not None:
            norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32)
            self.watch(Routed(counts, entered, inner, norms))
        return (outputs * gates[..., None]).sum(dim=1).to(hidden.dtype)

    def inner(self, entered: torch.Tensor, expert: int) -> torch.Tensor:
        """What one expert's `down_proj` gets: [T, hidden] to [T, intermediate]."""
        gate, up = functional.linear(entered, self.gate_up_proj[expert]).chunk(2, dim=-1)
        result: torch.Tensor = self.act_fn(gate) * up
        return result


def _grouped(rows: torch.Tensor, matrices: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
    parts = zip(torch.split(rows, list(counts)), matrices, strict=True)
    return torch.cat([_linear(part, matrix) for part, matrix in parts if len(part)])


def _linear(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    missing = max(0, _FEWEST_ROWS - len(rows))
    padded = functional.pad(rows, (0, 0, 0, missing)) if missing else rows
    return functional.linear(padded, matrix)[: len(rows)]
