"""A rank's experts in EXL3, and what they make of routed tokens. Nothing here needs vLLM.

    y = sum over k of topk_weights * W2[e] (act(gate) * up),   [gate; up] = W13[e] x,   e = topk_ids

Multiplications in the dtype of x, the sum over experts in float32.

Which experts have tokens is known on the CPU only after a GPU is done. A CUDA graph cannot wait for that: while one is
captured all experts see all tokens. Nor can it compile kernels or keep tables: with each number of rows, every format
among the experts is run once before.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from gemma4q_kernels import exl3
from gemma4q_kernels.exl3 import Exl3Weight
from gemma4q_kernels.exl3_layout import Span
from gemma4q_kernels.grouped_mm.activation import activate
from gemma4q_kernels.grouped_mm.routing import group_by_expert


class Expert(NamedTuple):
    """One expert: bits and codebooks of the three are their own."""

    gate: Exl3Weight
    up: Exl3Weight
    down: Exl3Weight


class Share(NamedTuple):
    """What one expert computes: rows of the batch, all where None, and their float32 weights."""

    expert: int
    rows: torch.Tensor | None
    weights: torch.Tensor


@dataclass(frozen=True)
class Experts:
    """The experts of one rank.

    Attributes:
        experts: by local id.
        hidden, inner: the features of their inputs and of what is between; `inner` may be a rank's part.
    """

    experts: Sequence[Expert]
    hidden: Span
    inner: Span
    _prepared: set[int] = field(default_factory=set)

    def __call__(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: str,
        expert_map: torch.Tensor | None,
    ) -> torch.Tensor:
        """[T, H] -> [T, H]; arguments as `gemma4q_kernels.grouped_mm` has them. Experts of other ranks add zero."""
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if x.is_cuda and not capturing and len(x) not in self._prepared:
            self._prepared.add(len(x))
            for expert in self.formats():
                self._expert(expert, x, activation)
        shares = all_shares if capturing else active_shares
        return self.total(x, shares(topk_weights, topk_ids, len(self.experts), expert_map), activation)

    def formats(self) -> Sequence[Expert]:
        """An expert of each combination of bits and codebooks."""
        return list({tuple((one.bits, one.codebook) for one in expert): expert for expert in self.experts}.values())

    def total(self, x: torch.Tensor, shares: Iterable[Share], activation: str) -> torch.Tensor:
        """The sum of what experts compute: [T, H] -> [T, H]."""
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for share in shares:
            rows = x if share.rows is None else x[share.rows]
            down = self._expert(self.experts[share.expert], rows, activation).float() * share.weights.unsqueeze(1)
            if share.rows is None:
                out.add_(down)
            else:
                out.index_add_(0, share.rows, down)
        return out.to(x.dtype)

    def _expert(self, expert: Expert, x: torch.Tensor, activation: str) -> torch.Tensor:
        both = exl3.linear(self.hidden.embed(x), [expert.gate, expert.up])
        gate, up = self.inner.extract(both), self.inner.extract(both, self.inner.covered)
        inner = activate(gate, activation) * up
        return self.hidden.extract(exl3.linear(self.inner.embed(inner), [expert.down]))


def active_shares(
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> Iterator[Share]:
    """Experts that have tokens, each with its own."""
    groups = group_by_expert(topk_weights, topk_ids, num_experts, expert_map)
    for expert, pairs in groups:
        yield Share(expert, groups.tokens[pairs], groups.weights[pairs])


def all_shares(
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> Iterator[Share]:
    """All experts with all tokens, most with a weight of zero: nothing here waits for the device."""
    ids = topk_ids.long()
    if expert_map is not None:
        ids = torch.where(ids >= 0, expert_map.long()[ids.clamp_min(0)], -1)
    for expert in range(num_experts):
        yield Share(expert, None, topk_weights.float().masked_fill(ids != expert, 0).sum(dim=1))
