"""What each expert computes of a routed batch: the (token, slot) pairs sorted by local expert, or all tokens.

Which experts have tokens is known on the CPU only after a GPU is done. A CUDA graph cannot wait for that: while one is
captured, every expert sees every token, most with a weight of zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Share(NamedTuple):
    """What one expert computes: rows of the batch, all where None, and their float32 weights."""

    expert: int
    rows: torch.Tensor | None
    weights: torch.Tensor

    def of(self, batch: torch.Tensor) -> torch.Tensor:
        """Its rows: [T, H] -> [P, H]."""
        return batch if self.rows is None else batch[self.rows]

    def add(self, out: torch.Tensor, computed: torch.Tensor) -> None:
        """Add what the expert made of its rows, float32 [P, H], weighted, to the sum, float32 [T, H]."""
        weighted = computed * self.weights.unsqueeze(1)
        if self.rows is None:  # of tokens that did not choose it, whatever overflowed is not added
            out.add_(weighted.masked_fill_(self.weights.unsqueeze(1) == 0, 0))
        else:
            out.index_add_(0, self.rows, weighted)


@dataclass(frozen=True)
class Groups:
    """Pairs of one batch in the order of their experts; pairs of experts held elsewhere are left out.

    tokens: int64 [P] row of the batch; weights: float32 [P]; experts: local ids that have pairs, ascending;
    counts: pairs of each of them, summing to P.
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    experts: tuple[int, ...]
    counts: tuple[int, ...]

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Each active expert with the range of its pairs."""
        start = 0
        for expert, count in zip(self.experts, self.counts, strict=True):
            yield expert, slice(start, start + count)
            start += count


def group_by_expert(
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> Groups:
    """Group [T, k] routing decisions by local expert.

    Args:
        topk_ids: int [T, k], global ids; local ones where there is no map. -1 marks an unused slot.
        num_experts: local experts.
        expert_map: int [global experts] -> local id, -1 for experts of another rank.

    Raises:
        ValueError: an id outside the experts.
    """
    ids = topk_ids.reshape(-1).long()
    limit = num_experts if expert_map is None else len(expert_map)
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < limit:
        raise ValueError(f"topk_ids: got {int(ids.min())}..{int(ids.max())}, expected -1..{limit - 1}")
    if expert_map is not None and len(expert_map):
        ids = torch.where(ids >= 0, expert_map.long()[ids.clamp_min(0)], -1)
    order = torch.argsort(ids, stable=True)
    order = order[int((ids < 0).sum()) :]
    experts, counts = torch.unique_consecutive(ids[order], return_counts=True)
    tokens = torch.div(order, max(topk_ids.shape[1], 1), rounding_mode="floor")
    weights = topk_weights.reshape(-1)[order].float()
    return Groups(tokens, weights, tuple(experts.tolist()), tuple(counts.tolist()))


def is_capturing(x: torch.Tensor) -> bool:
    """Whether what is done to `x` is captured into a graph of the device, and so must not wait for it."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def shares(
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> Iterator[Share]:
    """What each expert computes; arguments and errors as `group_by_expert` has them. In a graph ids are not checked."""
    choose = all_shares if is_capturing(topk_ids) else active_shares
    return choose(topk_weights, topk_ids, num_experts, expert_map)


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
